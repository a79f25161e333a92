# SPDX-License-Identifier: Apache-2.0
"""
Publishes a trained or converted model on the Hub, with its code, its processor and a model card:

    python -m examples.publish --model llava-hr-7b-sft-1024 --repo NAME/llava-hr-7b-sft-1024 --license llama2 \
        --base_model openai/clip-vit-large-patch14-336 lmsys/vicuna-7b-v1.5 --run llava-hr-7b-sft-1024 --dry-run

All of it becomes visible in one commit, or nothing does; after a broken upload the same command goes on. Weights in
safetensors go up as they are. `--dry-run` shows the files and the card and contacts nobody.

The card is made from what the folder and the command line tell. A README.md in the folder stays the card, unless a
trainer generated it: its text as it is, its metadata except for what the command line says.
"""

import importlib.util
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor, BitsAndBytesConfig, HfArgumentParser, logging
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

import modeling_llava_hr
from conversion._common import ConversionError, find_weight_files, read_json
from modeling_llava_hr import (
    LlavaHrConfig,
    LlavaHrForConditionalGeneration,
    LlavaHrProcessor,
)

from .model_card import CardArguments, CardError, make_card, read_results


MAX_SHARD_SIZE = "5GB"  # of weights that have to be written anew
# What an earlier publication may have left and `from_pretrained` might read instead of the new weights
WEIGHT_FILES = re.compile(r"(model|pytorch_model)[\w.-]*\.(safetensors|bin)(\.index\.json)?")


class PublishingError(ValueError):
    """Something that the user can put right; the command prints it without a traceback."""


@dataclass
class PublishArguments:
    """
    What is published, and where.

    Args:
        model (`str`): Folder with a model and its processor.
        repo (`str`): Repository on the Hub, `NAMESPACE/NAME`; is made if it does not exist.
        private (`bool`): Whether a new repository is private.
        variant_4bit (`bool`): Whether the model with NF4 weights is published as well, as `NAMESPACE/NAME-4bit`.
        dry_run (`bool`): Show what would be published and contact nobody.
    """

    model: str = field(metadata={"help": "folder with model and processor"})
    repo: str = field(metadata={"help": "NAMESPACE/NAME on the Hub"})
    private: bool = field(default=False, metadata={"help": "make a new repository private"})
    variant_4bit: bool = field(default=False, metadata={"help": "also publish NAMESPACE/NAME-4bit with NF4 weights"})
    dry_run: bool = field(default=False, metadata={"help": "show files and card, contact nobody"})


@dataclass
class Release:
    """What goes into one repository: paths there, and the files here or their content."""

    repo: str
    files: dict[str, Path | bytes]

    def __str__(self) -> str:
        sizes = {path: len(f) if isinstance(f, bytes) else f.stat().st_size for path, f in self.files.items()}
        lines = [f"{size:>16,}  {path}" for path, size in sorted(sizes.items())]
        return "\n".join([self.repo, *lines, f"{sum(sizes.values()):>16,}  bytes in {len(sizes)} files"])


def check_arguments(arguments: PublishArguments, card_arguments: CardArguments) -> None:
    """
    Raises:
        PublishingError: If an option cannot be right; names it.
    """
    if not Path(arguments.model).is_dir():
        raise PublishingError(
            f"--model: {arguments.model!r} is no folder. Name one that training or a conversion has written."
        )
    if arguments.repo.count("/") != 1:
        raise PublishingError(
            f"--repo must be NAMESPACE/NAME, but got {arguments.repo!r}. `hf auth whoami` names your namespaces."
        )
    for option, names in {
        "repo": [arguments.repo],
        "base_model": card_arguments.base_model,
        "dataset": card_arguments.dataset,
        "evaluation_dataset": filter(None, [card_arguments.evaluation_dataset]),
    }.items():
        for name in names:
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                raise PublishingError(f"--{option}: {name!r} is no valid Hub id: {error}") from None
    if arguments.variant_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise PublishingError('--variant_4bit needs bitsandbytes: pip install ".[quantization]" in the checkout.')


def check_links(folder: Path) -> None:
    """
    Raises:
        PublishingError: If a symbolic link leads out of the folder: what it leads to would become public.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise PublishingError(f"{path} is a link to something outside of the folder. Put the file itself there.")


def load(folder: Path) -> tuple[LlavaHrConfig, LlavaHrProcessor]:
    """
    Configuration and processor of a folder.

    Raises:
        PublishingError: If it holds no LLaVA-HR, or one without a processor.
    """
    if (folder / "adapter_config.json").is_file():
        raise PublishingError(f"{folder} holds a LoRA adapter. Merge it into its model first, see docs/training.md.")
    if read_json(folder / "config.json").get("model_type") != LlavaHrConfig.model_type:
        raise PublishingError(f"{folder} holds no LLaVA-HR. Convert a published checkpoint first, see README.md.")
    if not (folder / "processor_config.json").is_file():
        raise PublishingError(f"{folder} has no processor. Save it there with `processor.save_pretrained`.")
    try:
        return LlavaHrConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    except (OSError, StrictDataclassError, TypeError, ValueError) as error:
        raise PublishingError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error


def is_quantized(config: LlavaHrConfig) -> bool:
    """Whether a folder with this configuration has quantized weights."""
    return config.to_dict().get("quantization_config") is not None


def find_weights(folder: Path, model: LlavaHrForConditionalGeneration) -> list[Path]:
    """
    The safetensors files of a folder, checked against its configuration without reading their data.

    Args:
        folder (`Path`): The folder.
        model ([`LlavaHrForConditionalGeneration`]): The model that `config.json` describes, without memory.

    Returns:
        `list[Path]`: Shards and their index; empty if the weights are in another format.

    Raises:
        PublishingError: If there are no weights, a file is damaged, or names are missing or unexpected.
    """
    files = find_weight_files(folder, (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))  # as `from_pretrained` looks
    if not files:
        if find_weight_files(folder, (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
            return []
        raise PublishingError(f"{folder} has no weights: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}.")
    names = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names.update(tensors.keys())
        except SafetensorError as error:
            raise PublishingError(f"{file} is damaged ({error}). Save the model again.") from None
    expected = set(model.state_dict())
    if model.config.tie_word_embeddings:
        expected.discard("lm_head.weight")
    faults = [f"{name} missing" for name in sorted(expected - names)]
    if not is_quantized(model.config):  # quantized weights have statistics beside them
        faults += [f"{name} unexpected" for name in sorted(names - expected)]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise PublishingError(f"The weights in {folder} do not fit its config.json: {', '.join(faults[:3])}{more}.")
    return files if files[0].name == SAFE_WEIGHTS_NAME else [*files, folder / SAFE_WEIGHTS_INDEX_NAME]


def collect(
    folder: Path, staging: Path, processor: LlavaHrProcessor, weights: list[Path], quantize: bool = False
) -> dict[str, Path | bytes]:
    """
    Everything but the card. Code, configuration and processor are written anew by this version of the package.

    Args:
        folder (`Path`): The model.
        staging (`Path`): New folder for what has to be written.
        processor ([`LlavaHrProcessor`]): Its processor.
        weights (`list[Path]`): Weight files that go up as they are; if there are none, they are written anew.
        quantize (`bool`): Whether weights are written in 4 bits instead.

    Returns:
        `dict[str, Path | bytes]`: Path in the repository -> file.
    """
    staging.mkdir()
    files = {}
    if weights and not quantize:
        files = {file.name: file for file in weights}
        for file in Path(modeling_llava_hr.__file__).parent.glob("*_llava_hr.py"):
            shutil.copy(file, staging)
        LlavaHrConfig.from_pretrained(folder).save_pretrained(staging)  # beside the code: with a complete `auto_map`
        if (folder / "generation_config.json").is_file():
            shutil.copy(folder / "generation_config.json", staging)
    else:
        config = {}
        if quantize:  # saved before a first forward pass, which would repack the weights on a CPU
            config["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        model = LlavaHrForConditionalGeneration.from_pretrained(folder, dtype="auto", **config)
        try:
            model.save_pretrained(staging, max_shard_size=MAX_SHARD_SIZE)
        except SafetensorError as error:
            raise PublishingError(f"{staging} could not be written: {error}. TMPDIR can name a larger disk.") from None
    processor.save_pretrained(staging)
    return files | {path.relative_to(staging).as_posix(): path for path in staging.rglob("*") if path.is_file()}


def upload(api: HfApi, release: Release, private: bool) -> str:
    """
    Uploads a release in one commit, which also removes the weights of an earlier one that it does not replace.

    Args:
        api (`HfApi`): The Hub, as one user.
        release ([`Release`]): What and where.
        private (`bool`): Whether the repository must be private.

    Returns:
        `str`: Address of the commit.

    Raises:
        PublishingError: If the Hub refuses, or the connection breaks.
    """
    try:
        api.create_repo(release.repo, private=private or None, exist_ok=True)
        info = api.model_info(release.repo)
        if private and not info.private:
            raise PublishingError(
                f"--private: {release.repo} exists and is public. Make it private in its settings, or name another."
            )
        operations = [CommitOperationAdd(path, file) for path, file in sorted(release.files.items())]
        others = {file.rfilename for file in info.siblings} - set(release.files)
        stale = sorted(path for path in others if WEIGHT_FILES.fullmatch(path))
        operations += [CommitOperationDelete(path) for path in stale]
        # `upload_folder` may cut a long upload into several commits; a model must not appear in parts
        commit = api.create_commit(release.repo, operations, commit_message="Upload LLaVA-HR", parent_commit=info.sha)
        return commit.commit_url
    except PublishingError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # the client has no class of its own for all
        raise explain(error, release.repo) from error


def explain(error: Exception, repo: str) -> PublishingError:
    """One sentence for what can go wrong between here and the Hub."""
    response = error if isinstance(error, HfHubHTTPError) else error.__cause__
    status = response.response.status_code if isinstance(response, HfHubHTTPError) else None
    said = (response.server_message if status else None) or str(error.__cause__ or error).split("\n")[0]
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return PublishingError(
            "The Hub does not know who you are: the token is missing, wrong or expired. Log in with `hf auth login`, "
            "or set HF_TOKEN to a token with write access."
        )
    if status == 403:
        return PublishingError(
            f"Your token may not write to {repo} ({said}). Take one with write access, or a namespace of yours."
        )
    if isinstance(error, ValueError):  # of the card's metadata, before anything was sent
        return PublishingError(f"The Hub refuses this for {repo}: {' '.join(str(error).split())}")
    return PublishingError(
        f"Publishing {repo} broke off ({said}). The repository shows its earlier revision, or all of the new one if "
        "only the answer was lost. Start the same command again: files that have arrived are not sent twice."
    )


def publish(
    arguments: PublishArguments, card_arguments: CardArguments | None = None, api: HfApi | None = None
) -> None:
    """
    Publishes a model, or shows what would be published.

    Args:
        arguments ([`PublishArguments`]): What and where.
        card_arguments ([`CardArguments`], *optional*): What the card says beyond what the folder tells.
        api (`HfApi`, *optional*): The Hub; by default the one and the user that the environment names.

    Raises:
        PublishingError: If the folder or an option is wrong, or the Hub refuses; that repository is as it was.
        CardError, ConversionError: If a file that the card is made from cannot be read.
    """
    card_arguments, api = card_arguments or CardArguments(), api or HfApi()
    check_arguments(arguments, card_arguments)
    if not arguments.dry_run:
        try:
            api.whoami()  # before weights are quantized in vain
        except (HTTPError, OSError) as error:
            raise explain(error, arguments.repo) from error
    folder = Path(arguments.model)
    check_links(folder)
    config, processor = load(folder)
    if arguments.variant_4bit and is_quantized(config):
        raise PublishingError(f"--variant_4bit: {folder} is quantized already. Name the folder of the full weights.")
    with torch.device("meta"):
        model = LlavaHrForConditionalGeneration(config)
    weights = find_weights(folder, model)
    results = read_results(folder, card_arguments)
    with tempfile.TemporaryDirectory(prefix="publish-") as staging:
        facts = (card_arguments, model, processor, results)
        card = make_card(folder, arguments.repo, *facts, has_4bit_variant=arguments.variant_4bit)
        files = collect(folder, Path(staging, "full"), processor, weights)
        releases = [Release(arguments.repo, {**files, **results.files, "README.md": card.encode()})]
        if arguments.variant_4bit:
            repo = f"{arguments.repo}-4bit"
            card = make_card(folder, repo, *facts, full_model=arguments.repo)
            files = collect(folder, Path(staging, "4bit"), processor, weights, quantize=True)
            releases.append(Release(repo, {**files, "README.md": card.encode()}))
        # the 4-bit model first: the other one's card says that it is there
        for release in reversed(releases):
            print(release)
            if arguments.dry_run:
                print(f"\n{release.files['README.md'].decode()}")
            else:
                print(f"published: {upload(api, release, arguments.private)}")
    if arguments.dry_run:
        print("dry run: nothing was sent")


def main() -> None:
    parser = HfArgumentParser((PublishArguments, CardArguments), description="Publishes a model on the Hub.")
    arguments, card_arguments = parser.parse_args_into_dataclasses()
    logging.set_verbosity_error()
    try:
        publish(arguments, card_arguments)
    except (PublishingError, CardError, ConversionError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: a repository shows its earlier revision until all of the new one has arrived")


if __name__ == "__main__":
    main()
