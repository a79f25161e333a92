# SPDX-License-Identifier: Apache-2.0
"""`examples.publish` against a server that speaks the Hub's protocol."""

import json
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from converted_checkpoints import ROOT, TINY_MODEL
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForImageTextToText, TrainingArguments

from examples.model_card import CardArguments, hide_folders
from examples.publish import PublishArguments, publish


REPO = "someone/mini"
# huggingface_hub's own upload to the large-file storage
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
EVALUATION = {
    "command": "python -m training.tiny.evaluate --model /somewhere/me/model --data=/data/fineprint-256-4",
    "accuracy": {
        "coarse": {"accuracy": 1.0, "standard_error": 0.0, "num_questions": 200},
        "fine": {"accuracy": 0.715, "standard_error": 0.0319, "num_questions": 200},
        "fine, 1 texts": {"accuracy": 0.715, "standard_error": 0.0319, "num_questions": 200},
    },
}


@pytest.fixture
def folder(tmp_path):
    """A copy of the model, without a card of its own."""
    ignored = shutil.ignore_patterns("README.md", "*evaluation*", "run.json")
    return shutil.copytree(TINY_MODEL, tmp_path / "trained", ignore=ignored)


@pytest.fixture
def api(hub, monkeypatch):
    """A user of the stand-in, whose safetensors go to the large-file storage."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts of the client
    hub.large = True
    return HfApi(endpoint=hub.url, token=hub.token)


def get_card(folder: Path, capsys, **options) -> ModelCard:
    """The card that a dry run shows."""
    publish(PublishArguments(model=str(folder), repo=REPO, dry_run=True), CardArguments(**options))
    return ModelCard(capsys.readouterr().out.split(" files\n\n", 1)[1].rsplit("\ndry run", 1)[0])


PUBLISH = "from examples.publish import main; main()"

# Runs where `import modeling_llava_hr` fails: the snippets of the card, then a comparison of all weights
LOAD = """
import re, sys
sys.modules["modeling_llava_hr"] = None

from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForMultimodalLM

repo, output = sys.argv[1:]
Image.new("RGB", (60, 40), "navy").save("street.png")
card = open(hf_hub_download(repo, "README.md"), encoding="utf-8").read()
snippets = re.findall(r"```python\\n(.*?)```", card, flags=re.DOTALL)
namespace = {}
for snippet in snippets:
    exec(snippet, namespace)
model = namespace["pipe"].model
assert type(model).__module__.startswith("transformers_modules."), type(model)
save_file({name: weight.clone() for name, weight in model.state_dict().items()}, output)
for auto_class in (AutoModel, AutoModelForMultimodalLM):
    auto_class.from_pretrained(repo, trust_remote_code=True)
print("SNIPPETS", len(snippets), "4BIT", getattr(namespace.get("quantized", model), "is_loaded_in_4bit", False))
"""


def test_published_models_load_without_the_package(hub, folder, tmp_path):
    hub.large = True
    options = ("--model", folder, "--repo", REPO, "--base_model", "a/b", "--base_model", "c/d", "--variant_4bit")
    environment = {"PYTHONPATH": str(ROOT), "HF_TOKEN": hub.token}
    shown = hub.run(PUBLISH, *options, folder=tmp_path / "publish", **environment)
    assert list(hub.commits) == [f"{REPO}-4bit", REPO] and shown.count("published: ") == 2
    # the empty first commit and one more
    assert [len(commits) for commits in hub.commits.values()] == [2, 2]
    small_files, files = (hub.read(repo)[1] for repo in hub.commits)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    code = {path.name: path.read_bytes() for path in (ROOT / "modeling_llava_hr").glob("*_llava_hr*.py")}
    for content in (files, small_files):
        assert {path: content[path] for path in content if path.endswith(".py")} == code
        assert {"generation_config.json", "processor_config.json", "tokenizer.json"} <= set(content)
        assert json.loads(content["config.json"])["auto_map"].keys() == {
            *("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
        }
        # no file says where it lay
        assert not [path for path, data in content.items() if str(tmp_path).encode() in data]

    seen = hub.run(LOAD, REPO, tmp_path / "loaded.safetensors", folder=tmp_path / "load")
    assert "SNIPPETS 3 4BIT True" in seen
    loaded, expected = load_file(tmp_path / "loaded.safetensors"), load_file(folder / "model.safetensors")
    assert loaded.keys() >= expected.keys()
    assert all(loaded[name].equal(weight) and loaded[name].dtype == weight.dtype for name, weight in expected.items())

    assert len(small_files["model.safetensors"]) < len(files["model.safetensors"])
    seen = hub.run(LOAD, f"{REPO}-4bit", tmp_path / "small.safetensors", folder=tmp_path / "load-4bit")
    assert "SNIPPETS 2 4BIT True" in seen
    card = ModelCard(small_files["README.md"].decode())
    assert card.data.base_model == [REPO] and card.data.base_model_relation == "quantized"


def test_a_dry_run_shows_files_and_card_and_contacts_nobody(hub, api, folder, capsys):
    publish(PublishArguments(model=str(folder), repo=REPO, dry_run=True), api=api)
    shown = capsys.readouterr().out
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:>16,}  model.safetensors" in shown and "config.json" in shown
    assert "pipeline_tag: image-text-to-text" in shown and f'model="{REPO}"' in shown
    assert hub.requests == []


@pytest.mark.parametrize("route", ["large_upload", "commit"])
def test_a_broken_upload_leaves_the_earlier_revision_and_can_be_run_again(hub, api, folder, route):
    arguments = PublishArguments(model=str(folder), repo=REPO)
    publish(arguments, api=api)
    before = hub.read(REPO)

    weights = {name: weight + 1 for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    hub.requests.clear()
    hub.breaks = route
    with pytest.raises(ValueError, match=r"^Publishing someone/mini was interrupted .* earlier revision[^\n]*$"):
        publish(arguments, api=api)
    assert route in hub.requests and hub.read(REPO) == before

    hub.breaks = None
    publish(arguments, api=api)
    commit, files = hub.read(REPO)
    assert len(hub.commits[REPO]) == 3 and files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    if route == "commit":  # the weights had arrived
        assert hub.requests.count("large_upload") == 1


def test_weights_of_an_earlier_publication_are_removed_and_nothing_else(hub, api, folder):
    arguments = PublishArguments(model=str(folder), repo=REPO)
    publish(arguments, api=api)
    expected = hub.read(REPO)[1]
    old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    own = {"notes.md": b"mine", "models/model.safetensors": b"mine"}
    hub.write(REPO, {**dict.fromkeys(old, b"old"), **own})
    publish(arguments, api=api)
    assert hub.read(REPO)[1] == {**expected, **own}


def test_private_means_private(hub, api, folder):
    publish(PublishArguments(model=str(folder), repo=REPO, private=True), api=api)
    assert hub.private == {REPO}
    hub.private.clear()
    with pytest.raises(ValueError, match="--private: someone/mini exists and is public"):
        publish(PublishArguments(model=str(folder), repo=REPO, private=True), api=api)


@pytest.mark.parametrize("token", ["hf_wrong", None])
def test_a_wrong_or_missing_token_is_one_sentence(hub, api, folder, token, monkeypatch):
    monkeypatch.setattr(huggingface_hub.utils._headers, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"^The Hub does not know who you are.*`hf auth login`[^\n]*$"):
        publish(PublishArguments(model=str(folder), repo=REPO), api=HfApi(endpoint=hub.url, token=token))
    assert hub.commits == {}


def test_what_the_hub_refuses_is_one_sentence(hub, api, folder):
    with pytest.raises(ValueError, match=r"^Your token may not write to another/mini \(.*rights[^\n]*$"):
        publish(PublishArguments(model=str(folder), repo="another/mini"), api=api)
    with pytest.raises(ValueError, match=r'^The Hub refuses this for someone/mini: .*"license" must be[^\n]*$'):
        publish(PublishArguments(model=str(folder), repo=REPO), CardArguments(license="mine"), api)
    assert [list(hub.read(REPO)[1])] == [[".gitattributes"]]


def test_shards_go_up_as_they_are_and_other_formats_as_safetensors(hub, api, folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    publish(PublishArguments(model=str(folder), repo=REPO), api=api)
    published = load(hub.read(REPO)[1]["model.safetensors"])
    assert "pytorch_model.bin" not in hub.read(REPO)[1]
    assert published.keys() == weights.keys() and all(published[name].equal(weights[name]) for name in weights)

    (folder / "pytorch_model.bin").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    shards = {path.name: path.read_bytes() for path in folder.glob("model*")}
    publish(PublishArguments(model=str(folder), repo=REPO), api=api)
    assert len(shards) > 2
    assert {path: data for path, data in hub.read(REPO)[1].items() if path.startswith("model")} == {
        **shards,
        "modeling_llava_hr.py": (ROOT / "modeling_llava_hr" / "modeling_llava_hr.py").read_bytes(),
    }


def drop(name):
    return lambda folder: (folder / name).unlink()


def rename(folder):
    weights = load_file(folder / "model.safetensors")
    weights["other"] = weights.pop("model.vision_tower.fusion.low_res_proj.bias")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "--model: .* is not a folder"),
        (drop("config.json"), "config.json is missing"),
        (drop("processor_config.json"), "has no processor"),
        (drop("tokenizer.json"), "cannot be loaded"),
        (drop("model.safetensors"), "has no weights"),
        (lambda folder: os.truncate(folder / "model.safetensors", 2**20), "model.safetensors is damaged"),
        (rename, "do not fit .* model.vision_tower.fusion.low_res_proj.bias missing, other unexpected"),
        (lambda folder: (folder / "adapter_config.json").touch(), "LoRA adapter"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llava"}'), "is not a LLaVA-HR"),
        (lambda folder: (folder / "evaluation.json").write_text("{}"), "not a result of training.tiny.evaluate"),
    ],
)
def test_wrong_folders_are_refused(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        publish(PublishArguments(model=str(folder), repo=REPO, dry_run=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo": "mini"}, "--repo must be NAMESPACE/NAME, but got 'mini'"),
        ({"repo": "some one/mini"}, "some one/mini"),
        ({"base_model": ["a/b", "/somewhere/me/model"]}, "/somewhere/me/model"),
        ({"run": ["nowhere"]}, "nowhere/run.json is missing"),
        ({"evaluation": "nowhere.json"}, "nowhere.json is missing"),
        ({"evaluation_dataset": "a/b"}, "--evaluation_dataset names .* missing"),
    ],
)
def test_wrong_options_are_refused(folder, options, message):
    arguments = PublishArguments(model=str(folder), repo=options.get("repo", REPO), dry_run=True)
    card_arguments = CardArguments(**{name: value for name, value in options.items() if name != "repo"})
    with pytest.raises(ValueError, match=message):
        publish(arguments, card_arguments)


def test_the_card_says_what_is_known(folder, tmp_path, capsys):
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    run = tmp_path / "2-finetune"
    (run / "checkpoint-20").mkdir(parents=True)
    start = {"stage": "finetune", "model_name_or_path": "/somewhere/me/1-pretrain", "data_path": "me/pictures"}
    (run / "run.json").write_text(json.dumps(start))
    log = [{"learning_rate": 2e-4, "loss": 3.0}, {"learning_rate": 1e-5, "loss": 0.25}, {"eval_loss": 0.3}]
    state = {"global_step": 20, "epoch": 0.5, "log_history": log}
    (run / "checkpoint-20" / "trainer_state.json").write_text(json.dumps(state))
    (run / "training_args.json").write_text(TrainingArguments(per_device_train_batch_size=16).to_json_string())

    options = {"base_model": ["a/b"], "dataset": ["c/d"], "license": "llama2", "run": [str(run)]}
    card = get_card(folder, capsys, **options)
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
    assert (card.data.base_model, card.data.datasets, card.data.license) == (["a/b"], ["c/d"], "llama2")
    config = json.loads((folder / "config.json").read_text())
    for text in (
        f"{config['vision_config']['num_hidden_layers']} layers of width {config['vision_config']['hidden_size']}",
        f"`{config['high_res_vision_config']['architecture']}` of timm",
        ", ".join(map(str, config["mr_adapter_layers"])),
        "**finetune** from `1-pretrain` on `me/pictures`: 20 steps, 0.5 epochs, learning rate up to 0.0002, "
        "last loss 0.25, 16 x 1 samples per step and process, optimizer adamw_torch",
        "| FinePrint, fine | 71.5 % | standard error 3.2, 200 questions |",
        "python -m training.tiny.evaluate --model model --data=fineprint-256-4",
        "[a/b](https://huggingface.co/a/b)",
        "2403.03003",
    ):
        assert text in card.text, text
    # the parts are all there is
    millions = [float(number.replace(",", "")) for number in re.findall(r"\| ([\d,.]+) M \|", card.text)]
    weights = load_file(folder / "model.safetensors")
    assert sum(millions) == pytest.approx(sum(weight.numel() for weight in weights.values()) / 1e6, abs=0.03)


def test_results_take_the_form_that_the_hub_reads(hub, api, folder):
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / ".eval_results").mkdir()
    other = [{"dataset": {"id": "lmms-lab/textvqa", "task_id": "val"}, "value": 67.1}]
    (folder / ".eval_results" / "textvqa.yaml").write_text(yaml.safe_dump(other))
    publish(PublishArguments(model=str(folder), repo=REPO), CardArguments(evaluation_dataset="someone/fineprint"), api)
    files = hub.read(REPO)[1]
    entries = yaml.safe_load(files[".eval_results/fineprint.yaml"])
    assert [(entry["dataset"], entry["value"]) for entry in entries] == [
        ({"id": "someone/fineprint", "task_id": "coarse"}, 100.0),
        ({"id": "someone/fineprint", "task_id": "fine"}, 71.5),
    ]
    assert yaml.safe_load(files[".eval_results/textvqa.yaml"]) == other
    assert b"lmms-lab/textvqa), val | 67.1 |" in files["README.md"]


def test_a_card_of_ones_own_stays_and_a_trainers_does_not(folder, capsys):
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [mine]\nlanguage: en\n---\n# My model\n")
    card = get_card(folder, capsys)
    assert card.text.strip() == "# My model"
    assert card.data.license == "mit" and card.data.language == "en" and card.data.tags[0] == "mine"
    assert card.data.pipeline_tag == "image-text-to-text" and "llava_hr" in card.data.tags
    assert get_card(folder, capsys, license="llama2").data.license == "llama2"

    (folder / "README.md").write_text("---\ntags: [generated_from_trainer]\n---\n# Model Card\n")
    assert "# mini\n" in get_card(folder, capsys).text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--model /somewhere/me/a/model --n 3", "--model model --n 3"),
        ("--data=~/x/data", "--data=data"),
        ("from `/a/b` on `c/d`", "from `b` on `c/d`"),
        (".cache/train-tiny/model a/b", ".cache/train-tiny/model a/b"),
    ],
)
def test_folders_of_a_machine_are_hidden(text, expected):
    assert hide_folders(text) == expected
