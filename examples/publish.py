# SPDX-License-Identifier: Apache-2.0
"""
Publishes a trained or converted model on the Hub, with its code, its processor and a model card:

    python -m examples.publish --model llava-hr-7b-sft-1024 --repo NAME/llava-hr-7b-sft-1024 --license llama2 \
        --base_model openai/clip-vit-large-patch14-336 lmsys/vicuna-7b-v1.5 --run llava-hr-7b-sft-1024 --dry-run

It becomes visible in one commit, or not at all; after a broken upload the same command resumes. Weights in safetensors
are uploaded unchanged. `--dry-run` shows the files and the card and sends nothing.

    python -m examples.publish --model examples/tiny-llava-hr --space build/space

writes a folder for a Space (examples/space) with the model and its code in it.

The card is made from the folder and the command line. A README.md in the folder stays the card, unless a trainer
generated it: its text is unchanged, its metadata too except for what the command line says.
"""

import importlib.util
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor, HfArgumentParser, logging
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

import modeling_llava_hr
from conversion.checkpoints import find_weight_files, read_json
from modeling_llava_hr import LlavaHrConfig, LlavaHrForConditionalGeneration, LlavaHrProcessor
from modeling_llava_hr.utils import check_new_folder, get_4bit_config, new_folder, run_command

from .model_card import CardArguments, make_card, read_results


SPACE = Path(__file__).parent / "space"
MAX_SHARD_SIZE = "5GB"  # of weights that are written again
# What an earlier publication may have left and `from_pretrained` might read instead of the new weights
WEIGHT_FILES = re.compile(r"(model|pytorch_model)[\w.-]*\.(safetensors|bin)(\.index\.json)?")


@dataclass
class PublishArguments:
    """
    What is published, and where.

    Args:
        model (`str`): Folder with a model and its processor.
        repo (`str`, *optional*): Repository on the Hub, `NAMESPACE/NAME`; is created if it does not exist.
        space (`str`, *optional*): Write a Space with this model into this new folder instead.
        private (`bool`): Whether a new repository is private.
        variant_4bit (`bool`): Whether the model with NF4 weights is published as well, as `NAMESPACE/NAME-4bit`.
        dry_run (`bool`): Show what would be published and send nothing.
    """

    model: str = field(metadata={"help": "folder with model and processor"})
    repo: str | None = field(default=None, metadata={"help": "NAMESPACE/NAME on the Hub"})
    space: str | None = field(default=None, metadata={"help": "new folder for a Space with the model; sends nothing"})
    private: bool = field(default=False, metadata={"help": "make a new repository private"})
    variant_4bit: bool = field(default=False, metadata={"help": "also publish NAMESPACE/NAME-4bit with NF4 weights"})
    dry_run: bool = field(default=False, metadata={"help": "show files and card, send nothing"})


def check_arguments(arguments: PublishArguments, card_arguments: CardArguments) -> None:
    """
    Raises:
        ValueError: If an option cannot be right.
    """
    if not Path(arguments.model).is_dir():
        raise ValueError(f"--model: {arguments.model!r} is not a folder. Name one written by training or conversion.")
    if (arguments.repo is None) == (arguments.space is None):
        raise ValueError(
            "Give --repo NAMESPACE/NAME to publish the model, or --space FOLDER to write a Space with it."
        )
    if arguments.space is not None:
        check_new_folder(arguments.space, "--space")
        return
    if arguments.repo.count("/") != 1:
        raise ValueError(
            f"--repo must be NAMESPACE/NAME, but got {arguments.repo!r}. `hf auth whoami` names your namespaces."
        )
    for name in (arguments.repo, *card_arguments.base_model, *card_arguments.dataset):
        validate_repo_id(name)
    if card_arguments.evaluation_dataset:
        validate_repo_id(card_arguments.evaluation_dataset)
    if arguments.variant_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError('--variant_4bit needs bitsandbytes: pip install ".[quantization]" in the checkout.')


def load(folder: Path) -> tuple[LlavaHrForConditionalGeneration, LlavaHrProcessor]:
    """
    The model of a folder without memory for its weights, and its processor.

    Raises:
        ValueError: If it is not a LLaVA-HR with a processor, or links to files elsewhere, which would become public.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is a link to something outside of the folder. Put the file itself there.")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds a LoRA adapter. Merge it into its model first, see docs/training.md.")
    if read_json(folder / "config.json").get("model_type") != LlavaHrConfig.model_type:
        raise ValueError(f"{folder} is not a LLaVA-HR. Convert a published checkpoint first, see README.md.")
    if not (folder / "processor_config.json").is_file():
        raise ValueError(f"{folder} has no processor. Save it there with `processor.save_pretrained`.")
    try:
        with torch.device("meta"):
            model = LlavaHrForConditionalGeneration(LlavaHrConfig.from_pretrained(folder))
        return model, AutoProcessor.from_pretrained(folder)
    except (OSError, StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error


def find_weights(folder: Path, model: LlavaHrForConditionalGeneration, is_quantized: bool) -> list[Path]:
    """
    The safetensors files of a folder. Their names are compared with the model's without reading data.

    Returns:
        `list[Path]`: Shards and their index; empty if the weights are in another format.

    Raises:
        ValueError: If there are no weights, a file is damaged, or names are missing or unexpected.
    """
    files = find_weight_files(folder, (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))  # in `from_pretrained`'s order
    if not files:
        if find_weight_files(folder, (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
            return []
        raise ValueError(f"{folder} has no weights: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}.")
    names: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names.update(tensors.keys())
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}). Save the model again.") from None
    expected = set(model.state_dict())
    if model.config.tie_word_embeddings:
        expected.discard("lm_head.weight")
    faults = [f"{name} missing" for name in sorted(expected - names)]
    if not is_quantized:  # quantized weights have statistics beside them
        faults += [f"{name} unexpected" for name in sorted(names - expected)]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"The weights in {folder} do not fit its config.json: {', '.join(faults[:3])}{more}.")
    return files if files[0].name == SAFE_WEIGHTS_NAME else [*files, folder / SAFE_WEIGHTS_INDEX_NAME]


def collect(
    folder: Path, staging: Path, processor: LlavaHrProcessor, weights: list[Path], quantize: bool = False
) -> dict[str, Path | bytes]:
    """
    Everything but the card. Code, configuration and processor are written by this version of the package.

    Args:
        folder (`Path`): The model.
        staging (`Path`): New folder for files that have to be written.
        processor ([`LlavaHrProcessor`]): Its processor.
        weights (`list[Path]`): Weight files to upload unchanged; if there are none, weights are written again.
        quantize (`bool`): Whether weights are written in 4 bits instead.

    Returns:
        `dict[str, Path | bytes]`: Path in the repository -> file.
    """
    staging.mkdir()
    files = {}
    if weights and not quantize:
        files = {file.name: file for file in weights}
        for file in Path(modeling_llava_hr.__file__).parent.glob("*_llava_hr*.py"):
            shutil.copy(file, staging)
        LlavaHrConfig.from_pretrained(folder).save_pretrained(staging)  # beside the code: with a complete `auto_map`
        if (folder / "generation_config.json").is_file():
            shutil.copy(folder / "generation_config.json", staging)
    else:
        # saved before the first forward pass, which would repack 4-bit weights on a CPU
        options = {"quantization_config": get_4bit_config()} if quantize else {}
        model = LlavaHrForConditionalGeneration.from_pretrained(folder, dtype="auto", **options)
        try:
            model.save_pretrained(staging, max_shard_size=MAX_SHARD_SIZE)
        except SafetensorError as error:
            raise ValueError(f"{staging} could not be written: {error}. TMPDIR can name a larger disk.") from None
    processor.save_pretrained(staging)
    return files | {path.relative_to(staging).as_posix(): path for path in staging.rglob("*") if path.is_file()}


def write_space(arguments: PublishArguments) -> None:
    """Writes the folder of a Space: the page and, in a folder beside it, the model with its code."""
    folder, space = Path(arguments.model).resolve(), Path(arguments.space)
    model, processor = load(folder)
    is_quantized = model.config.to_dict().get("quantization_config") is not None
    weights = find_weights(folder, model, is_quantized)
    with new_folder(space, "--space") as partial:
        shutil.copytree(SPACE, partial, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        collect(folder, partial / folder.name, processor, weights)
        for file in weights:
            shutil.copy(file, partial / folder.name)
    print(f"written: {space}. Upload it: hf upload NAMESPACE/NAME {space} . --type space")


def upload(api: HfApi, repo: str, files: dict[str, Path | bytes], private: bool) -> str:
    """
    Uploads files in one commit, which also removes weights of an earlier publication that they do not replace.

    Args:
        api (`HfApi`): The Hub, as one user.
        repo (`str`): The repository; is created if it does not exist.
        files (`dict[str, Path | bytes]`): Path in the repository -> file or content.
        private (`bool`): Whether the repository must be private.

    Returns:
        `str`: Address of the commit.

    Raises:
        ValueError: If the Hub refuses, or the repository is public and must be private.
    """
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        info = api.model_info(repo)
        if not private or info.private:
            stale = {file.rfilename for file in info.siblings if WEIGHT_FILES.fullmatch(file.rfilename)} - set(files)
            operations = [CommitOperationAdd(path, file) for path, file in sorted(files.items())]
            operations += [CommitOperationDelete(path) for path in sorted(stale)]
            # `upload_folder` splits a large upload into several commits; a model must not appear in parts
            options = {"commit_message": "Upload LLaVA-HR", "parent_commit": info.sha}
            return api.create_commit(repo, operations, **options).commit_url
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # the client has no common class
        raise ValueError(explain(error, repo)) from error
    raise ValueError(f"--private: {repo} exists and is public. Make it private in its settings, or name another.")


def explain(error: Exception, repo: str) -> str:
    """One sentence for what can go wrong between here and the Hub."""
    response = error if isinstance(error, HfHubHTTPError) else error.__cause__
    status = response.response.status_code if isinstance(response, HfHubHTTPError) else None
    reason = (response.server_message if status else None) or str(error.__cause__ or error).split("\n")[0]
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return (
            "The Hub does not know who you are: the token is missing, wrong or expired. Log in with `hf auth login`, "
            "or set HF_TOKEN to a token with write access."
        )
    if status == 403:
        return f"Your token may not write to {repo} ({reason}). Use one with write access, or a namespace of yours."
    if isinstance(error, ValueError):  # about the card's metadata, before anything was sent
        return f"The Hub refuses this for {repo}: {' '.join(str(error).split())}"
    return (
        f"Publishing {repo} was interrupted ({reason}). The repository shows its earlier revision, or all of the new "
        "one if only the answer was lost. Run the same command again: uploaded files are not sent twice."
    )


def publish(
    arguments: PublishArguments, card_arguments: CardArguments | None = None, api: HfApi | None = None
) -> None:
    """
    Publishes a model, or shows what would be published.

    Args:
        arguments ([`PublishArguments`]): What and where.
        card_arguments ([`CardArguments`], *optional*): What the card says in addition to what the folder tells.
        api (`HfApi`, *optional*): The Hub; by default the one and the user that the environment names.

    Raises:
        ValueError: If the folder or an option is wrong, or the Hub refuses; that repository is unchanged.
    """
    card_arguments, api = card_arguments or CardArguments(), api or HfApi()
    check_arguments(arguments, card_arguments)
    if arguments.space is not None:
        write_space(arguments)
        return
    folder, repo = Path(arguments.model), arguments.repo
    try:
        if not arguments.dry_run:
            api.whoami()  # before weights are quantized in vain
    except (HTTPError, OSError) as error:
        raise ValueError(explain(error, repo)) from error
    model, processor = load(folder)
    is_quantized = model.config.to_dict().get("quantization_config") is not None
    if arguments.variant_4bit and is_quantized:
        raise ValueError(f"--variant_4bit: {folder} is quantized already. Name the folder of the full weights.")
    weights = find_weights(folder, model, is_quantized)
    results = read_results(folder, card_arguments)
    with tempfile.TemporaryDirectory(prefix="publish-") as staging:
        facts = (card_arguments, model, processor, results)
        card = make_card(folder, repo, *facts, has_4bit_variant=arguments.variant_4bit)
        files = collect(folder, Path(staging, "full"), processor, weights) | results.files
        releases = [(repo, {**files, "README.md": card.encode()})]
        if arguments.variant_4bit:
            card = make_card(folder, f"{repo}-4bit", *facts, full_model=repo)
            files = collect(folder, Path(staging, "4bit"), processor, weights, quantize=True)
            # first, as the full model's card links to it
            releases.insert(0, (f"{repo}-4bit", {**files, "README.md": card.encode()}))
        for name, files in releases:
            sizes = {path: len(f) if isinstance(f, bytes) else f.stat().st_size for path, f in files.items()}
            lines = [f"{size:>16,}  {path}" for path, size in sorted(sizes.items())]
            print(name, *lines, f"{sum(sizes.values()):>16,}  bytes in {len(sizes)} files", sep="\n")
            if arguments.dry_run:
                print(f"\n{files['README.md'].decode()}")
            else:
                print(f"published: {upload(api, name, files, arguments.private)}")
    if arguments.dry_run:
        print("dry run: nothing was sent")


def main() -> None:
    parser = HfArgumentParser((PublishArguments, CardArguments), description="Publishes a model on the Hub.")
    arguments = parser.parse_args_into_dataclasses()
    logging.set_verbosity_error()
    publish(*arguments)


if __name__ == "__main__":
    run_command(main)
