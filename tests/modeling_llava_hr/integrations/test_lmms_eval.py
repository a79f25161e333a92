# SPDX-License-Identifier: Apache-2.0
"""
LLaVA-HR in lmms-eval: the classes with prompts written out by hand, the tasks with data made here, the real command on
FinePrint. Runs in an environment of its own, `make test-lmms-eval`.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from snippets import expand, get_blocks

import modeling_llava_hr


pytest.importorskip("lmms_eval", reason="make test-lmms-eval")

from lmms_eval.__main__ import parse_eval_args  # noqa: E402
from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.api.task import ConfigurableTask  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402
from lmms_eval.utils import load_yaml_config  # noqa: E402

from modeling_llava_hr.integrations.lmms_eval import (  # noqa: E402
    LlavaHrChatEvaluation,
    LlavaHrEvaluation,
    get_generation_options,
)


ROOT = Path(__file__).parents[3]
TASKS = Path(modeling_llava_hr.__file__).parent / "integrations" / "tasks"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "until": []}
SIZES = {"size": 128, "low_res_size": 56}


def draw(color: str) -> PILImage.Image:
    image = PILImage.new("RGB", (80, 60), color)
    image.paste("white", (10, 10, 40, 25))
    return image


DOCS = [
    {"images": [draw("red")], "text": "What is this?"},
    {"images": [], "text": "Say something about a long day in a short sentence."},
    {"images": [draw("green"), draw("blue")], "text": "Compare."},
    {"images": [draw("black")], "text": "Which color is it, and why is it that one?"},
]


@pytest.fixture(scope="module")
def evaluations(converted_stage2):
    """The simple and the chat class around one model with random weights."""
    options = {"device": "cpu", "dtype": "float32", **SIZES}
    simple = LlavaHrEvaluation(str(converted_stage2), batch_size=3, **options)
    chat = LlavaHrChatEvaluation(str(converted_stage2), batch_size="3", **options)
    chat.model = simple.model
    for evaluation in (simple, chat):
        evaluation.task_dict = {"task": {"test": DOCS}}
    return simple, chat


def make_request(kind: str, arguments: tuple, index: int) -> Instance:
    metadata = {"task": "task", "doc_id": index, "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=metadata)


def get_prompt(doc: dict, answer: str = "") -> str:
    tags = "<image> \n" * len(doc["images"])  # the suffix of Llama's tokenizer
    return f"<s> {SYSTEM} USER: {tags}{doc['text']} ASSISTANT:{answer}"


def encode(evaluation, doc: dict, answer: str = ""):
    images = doc["images"] or None
    return evaluation.processor(text=get_prompt(doc, answer), images=images, return_tensors="pt", **SIZES)


def answer_alone(evaluation, doc: dict, **options) -> str:
    """The model's own greedy answer to one question, its prompt written out."""
    inputs = encode(evaluation, doc)
    options = {"max_new_tokens": 6, "do_sample": False, "temperature": None, "top_p": None, **options}
    output = evaluation.model.generate(**inputs, **options)
    return evaluation.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def to_messages(doc: dict) -> list[dict]:
    content = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["text"]}]}]


@pytest.mark.parametrize("form", ["simple", "chat"])
def test_answers_in_batches_are_those_of_single_questions_in_their_order(evaluations, form):
    evaluation = evaluations[form == "chat"]
    requests = []
    for index, doc in enumerate(DOCS):
        # another option for the last one: it must not share a batch with the others
        options = {**OPTIONS, "max_new_tokens": 3} if index == 3 else dict(OPTIONS)
        end = (index, "task", "test")
        arguments = (doc["text"], options, lambda row: row["images"], *end)
        if form == "chat":
            arguments = (doc["text"], to_messages, options, *end)
        requests.append(make_request("generate_until", arguments, index))
    answers = evaluation.generate_until(requests)
    expected = [answer_alone(evaluation, doc) for doc in DOCS[:3]]
    expected.append(answer_alone(evaluation, DOCS[3], max_new_tokens=3))
    assert answers == expected
    assert len(set(answers)) > 1


def test_loss_of_an_answer_is_its_own_log_softmax_sum(evaluations):
    evaluation, _ = evaluations
    cases = [(0, " red"), (1, lambda doc: "a day"), (2, " yes, they are"), (0, " a blue box")]
    requests = [
        make_request("loglikelihood", (DOCS[i]["text"], target, lambda row: row["images"], i, "task", "test"), i)
        for i, target in cases
    ]
    results = evaluation.loglikelihood(requests)
    for (index, target), (loss, is_greedy) in zip(cases, results, strict=True):
        answer = target if isinstance(target, str) else " a day"
        prompt = encode(evaluation, DOCS[index])["input_ids"]
        inputs = encode(evaluation, DOCS[index], answer)
        ids = inputs["input_ids"][0]
        assert (ids[: prompt.shape[1]] == prompt[0]).all()
        with torch.no_grad():
            logits = evaluation.model(**inputs).logits[0, :-1]
        positions = range(prompt.shape[1] - 1, len(ids) - 1)
        expected = sum(logits[position].log_softmax(-1)[ids[position + 1]].item() for position in positions)
        # float32, padding in the batch
        assert loss == pytest.approx(-expected, rel=1e-4)
        assert is_greedy == all(logits[position].argmax() == ids[position + 1] for position in positions)


def test_multiple_choice_takes_the_most_likely_answer(evaluations, tmp_path):
    """The sign of what `loglikelihood` gives is the one that lmms-eval's scoring expects."""
    evaluation, _ = evaluations
    choices = ["red", "a very long and quite unlikely answer"]
    data = Dataset.from_list([{"question": DOCS[0]["text"], "gold": 0}])
    DatasetDict({"test": data}).save_to_disk(tmp_path / "data")
    task = ConfigurableTask(
        config={
            "task": "task",
            "dataset_path": str(tmp_path / "data"),
            "dataset_kwargs": {"load_from_disk": True},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "question",
            "doc_to_choice": choices,
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    )
    requests = [
        make_request("loglikelihood", (DOCS[0]["text"], f" {choice}", lambda row: row["images"], 0, "task", "test"), 0)
        for choice in choices
    ]
    assert task.process_results(data[0], evaluation.loglikelihood(requests)) == {"acc": 1.0}


@pytest.mark.parametrize("form", ["simple", "chat"])
def test_rounds_go_on_until_the_task_is_content(evaluations, form):
    evaluation = evaluations[form == "chat"]
    second = {"images": DOCS[2]["images"], "text": "And these?"}
    seen = []

    def ask_on(doc, previous_output=None, round_idx=None, previous_round_info=None):
        seen.append((round_idx, list(previous_output), previous_round_info))
        return second["images"], second["text"], round_idx == 2, previous_output, f"info {round_idx}"

    def ask_on_by_messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return to_messages(doc)
        *_, is_done, answers, info = ask_on(doc, previous_output, round_idx, previous_round_info)
        return None if is_done else to_messages(second), is_done, answers, info

    doc, end = DOCS[0], (0, "task", "test")
    arguments = (doc["text"], dict(OPTIONS), lambda row: row["images"], ask_on, *end)
    if form == "chat":
        arguments = (doc["text"], ask_on_by_messages, dict(OPTIONS), *end)
    answers = evaluation.generate_until_multi_round([make_request("generate_until_multi_round", arguments, 0)])
    first, last = answer_alone(evaluation, doc), answer_alone(evaluation, second)
    assert answers == [[first, last]]
    assert seen == [(1, [first], None), (2, [first, last], "info 1")]


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, {"max_new_tokens": 128, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}),
        ({"temperature": 0.7, "top_p": 0.9}, {"max_new_tokens": 128, "do_sample": True}),
        ({"temperature": 0.2, "do_sample": False, "max_new_tokens": 5}, {"max_new_tokens": 5, "temperature": None}),
        ({"image_aspect_ratio": "original", "num_beams": 2, "unheard_of": 1}, {"num_beams": 2}),
    ],
)
def test_generation_options(given, expected):
    options, ends = get_generation_options(given)
    assert ends == [] and expected.items() <= options.items()
    assert "image_aspect_ratio" not in options and "unheard_of" not in options


def test_answers_end_before_the_given_strings(evaluations):
    evaluation, _ = evaluations
    whole = answer_alone(evaluation, DOCS[0])
    end = whole[len(whole) // 2]
    arguments = (DOCS[0]["text"], {**OPTIONS, "until": end}, lambda row: row["images"], 0, "task", "test")
    (answer,) = evaluation.generate_until([make_request("generate_until", arguments, 0)])
    assert answer == whole.split(end)[0].strip() != whole


def test_image_tags_in_a_question_stand_for_its_images(evaluations):
    evaluation, _ = evaluations
    text = f"{DOCS[0]['text']} <image>"
    arguments = (text, dict(OPTIONS), lambda row: row["images"], 0, "task", "test")
    (answer,) = evaluation.generate_until([make_request("generate_until", arguments, 0)])
    assert answer == answer_alone(evaluation, DOCS[0])


def test_what_is_no_image_is_refused(evaluations):
    evaluation, _ = evaluations
    arguments = ("What?", dict(OPTIONS), lambda row: ["video.mp4"], 0, "task", "test")
    with pytest.raises(ValueError, match="video.mp4"):
        evaluation.generate_until([make_request("generate_until", arguments, 0)])


@pytest.mark.parametrize("batch_size", ["auto", 0, "-1"])
def test_batch_size_must_be_a_number(batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        LlavaHrEvaluation("none", batch_size=batch_size)


def test_likelihoods_need_the_simple_form(evaluations):
    with pytest.raises(ValueError, match="--force_simple"):
        evaluations[1].loglikelihood([])


def load_task(name: str, data: Path | None = None) -> ConfigurableTask:
    config = load_yaml_config(str(TASKS / f"{name}.yaml"))
    if data is not None:
        config |= {"dataset_path": str(data), "dataset_kwargs": {"load_from_disk": True}}
    return ConfigurableTask(config=config)


def test_all_tasks_are_found_and_name_functions_that_exist(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # MM-Vet's functions make a client for the judge when imported
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert manager.all_tasks == sorted(path.stem for path in TASKS.glob("*.yaml"))
    for name in manager.all_tasks:
        load_yaml_config(str(TASKS / f"{name}.yaml"))


def test_group_lists_all_eleven_benchmarks_under_names_that_exist():
    group = load_yaml_config(str(TASKS / "llava_hr_paper.yaml"))["task"]
    assert len(set(group)) == 11
    assert set(group) <= set(TaskManager(include_path=str(TASKS)).all_subtasks)


def test_ocrvqa_asks_each_question_and_compares_without_case(tmp_path):
    features = Features({"image": Image(), "questions": List(Value("string")), "answers": List(Value("string"))})
    rows = [
        {
            "image": draw("red"),
            "questions": ["Who wrote it?", "What is the title?"],
            "answers": ["A. B. C", " Red "],
        },
        {"image": draw("blue"), "questions": ["Is it a romance?"], "answers": ["No"]},
    ]
    DatasetDict({"test": Dataset.from_list(rows, features=features)}).save_to_disk(tmp_path / "data")
    task = load_task("ocrvqa", tmp_path / "data")
    docs = list(task.eval_docs)
    assert [task.doc_to_text(doc) for doc in docs] == [
        f"{question}\nAnswer the question using a single word or phrase."
        for question in ("Who wrote it?", "What is the title?", "Is it a romance?")
    ]
    assert [task.doc_to_target(doc) for doc in docs] == ["A. B. C", "Red", "No"]
    assert [task.doc_to_visual(doc)[0].getpixel((0, 0)) for doc in docs] == [(255, 0, 0), (255, 0, 0), (0, 0, 255)]
    for doc, answer, score in zip(docs, ["a. b. c ", "red book", "NO"], [1.0, 0.0, 1.0], strict=True):
        assert task.process_results(doc, [answer]) == {"exact_match": score}


def test_textvqa_has_the_ocr_system_s_texts_in_the_prompt():
    config = load_yaml_config(str(TASKS / "textvqa_val_ocr.yaml"))
    doc = {"question": "what is the brand?", "ocr_tokens": ["DAKOTA", "DIGITAL"]}
    assert config["doc_to_text"](doc, config["lmms_eval_specific_kwargs"]["default"]) == (
        "What is the brand?\nReference OCR token: DAKOTA, DIGITAL\nAnswer the question using a single word or phrase."
    )


def test_videos_are_their_middle_frame():
    config = load_yaml_config(str(TASKS / "seedbench_one_frame.yaml"))
    frames = [draw(color) for color in ("red", "green", "blue")]
    for images, color in ((frames, (0, 128, 0)), (frames[:1], (255, 0, 0))):
        (image,) = config["doc_to_visual"]({"image": images})
        assert image.getpixel((0, 0)) == color


def run(*command: str, cwd: Path, **environment: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_command_gives_the_accuracy_of_the_tiny_models_evaluation(tmp_path):
    """
    With the trained tiny model. Questions one by one: then both paths compute the same numbers, and answers are
    equal to the last character whatever the precision.
    """
    from training.tiny.evaluate import EvaluateArguments, evaluate
    from training.tiny.fineprint import FinePrintArguments, generate

    model = ROOT / "examples" / "tiny-llava-hr"
    data, tasks = tmp_path / ".cache" / "fineprint", ROOT / "training" / "tiny" / "lmms_eval"
    generate(FinePrintArguments(output=str(data), num_train=0, num_validation=0, num_test=4, size=256, workers=1))
    expected = evaluate(EvaluateArguments(model=str(model), data=str(data), batch_size=1))

    model_args = f"pretrained={model}"
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava_hr", "--model_args", model_args, "--device", "cpu"]
    command += ["--include_path", str(tasks), "--tasks", "fineprint", "--output_path", str(tmp_path / "out")]
    output = run(*command, "--log_samples", cwd=tmp_path)
    files = list((tmp_path / "out").rglob("*_results.json"))
    assert len(files) == 1, output  # an error leaves none, but its exit status is 0
    results = json.loads(files[0].read_text())["results"]
    for kind in ("fine", "coarse"):
        accuracy = results[f"fineprint_{kind}"]["exact_match,none"]
        assert accuracy == pytest.approx(expected["accuracy"][kind]["accuracy"], abs=5e-5)  # rounded there
    answers = {}
    for file in (tmp_path / "out").rglob("*_samples_*.jsonl"):
        for line in file.read_text().splitlines():
            sample = json.loads(line)
            answers[sample["input"], sample["target"]] = sample["filtered_resps"]
    for sample in expected["samples"]:
        assert answers[sample["question"], sample["expected"]] == sample["answer"]


def test_documented_commands_are_accepted(tmp_path, monkeypatch):
    """By lmms-eval's own parser."""
    blocks = [block for language, block in get_blocks("docs/evaluation.md") if "lmms-eval --" in block]
    commands = [words[:-1] for block in blocks for words in expand(block, tmp_path) if words[0] == "lmms-eval"]
    assert len(commands) == 3
    for command in commands:
        monkeypatch.setattr(sys, "argv", command)
        _, arguments = parse_eval_args()  # ends the process for an unknown option or value
        assert arguments.model == "llava_hr" and arguments.tasks


def test_without_lmms_eval_the_extra_is_named(monkeypatch):
    """And what fails within an installed lmms-eval is named itself."""
    monkeypatch.delitem(sys.modules, "modeling_llava_hr.integrations.lmms_eval")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lmms_eval", None)
        with pytest.raises(ImportError, match=r"lmms-eval: pip install \"\.\[evaluation\]\""):
            importlib.import_module("modeling_llava_hr.integrations.lmms_eval")
    monkeypatch.setitem(sys.modules, "lmms_eval.protocol", None)
    with pytest.raises(ImportError, match="lmms_eval.protocol"):
        importlib.import_module("modeling_llava_hr.integrations.lmms_eval")


def test_lmms_eval_finds_the_installed_package(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "modeling_llava_hr", source / "modeling_llava_hr")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "--target", str(target), str(source), cwd=tmp_path)
    installed = {path.name for path in (target / TASKS.relative_to(ROOT)).iterdir() if path.is_file()}
    assert installed == {path.name for path in TASKS.iterdir() if path.is_file()}
    code = (
        "from lmms_eval.models import get_model\n"
        "for force_simple in (True, False):\n"
        "    print(get_model('llava_hr', force_simple).__name__)\n"
        "import modeling_llava_hr; print(modeling_llava_hr.__file__)\n"
    )
    output = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert "LlavaHrEvaluation\nLlavaHrChatEvaluation\n" in output
    assert str(target) in output
