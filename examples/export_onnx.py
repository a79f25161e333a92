# SPDX-License-Identifier: Apache-2.0
"""
Exports a model to ONNX and answers a question with ONNX Runtime:

    python -m examples.export_onnx --model llava-hr-7b-sft-1024-hf --output llava-hr-7b-onnx

Three graphs, for any number of images and any length: `image_encoder`, `embed_tokens` and `language_model`, which
takes embeddings and a cache. The features of the images replace the embeddings of the image tokens in between.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, DynamicCache, PreTrainedModel

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import check_new_folder, new_folder, run_command


if TYPE_CHECKING:
    from transformers.exporters import ExportedModel

HERE = Path(__file__).parent


class ImageEncoder(torch.nn.Module):
    """Both towers and the projector: `(images, 3, H, H)` -> `(images, g * g, D)`."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor, low_res_pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        return self.model.get_image_features(pixel_values, low_res_pixel_values, return_dict=True).pooler_output


@torch.no_grad()
def export(model: PreTrainedModel, inputs: BatchFeature) -> "ExportedModel":
    """The three graphs, traced with the processor's inputs for one question."""
    from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    _, sample = decompose_for_generation(model, inputs, multi_token_decode=True)["decode"]
    embeddings = model.get_input_embeddings()
    sample["inputs_embeds"] = embeddings(sample.pop("input_ids"))
    # Two images: an axis of one would be fixed
    images = {name: value.repeat(2, 1, 1, 1) for name, value in inputs.items() if name.endswith("pixel_values")}
    parts = {
        "image_encoder": (ImageEncoder(model), images),
        "embed_tokens": (embeddings, {"input": inputs["input_ids"]}),
        "language_model": (model, sample),
    }
    exporter, config = OnnxExporter(), OnnxConfig(dynamic=True)
    components = {name: exporter.export(*part, config).components["model"] for name, part in parts.items()}
    return ExportedModel(components, exporter.export_format, model.config, model.generation_config)


def answer(exported: "ExportedModel", inputs: BatchFeature, max_new_tokens: int) -> list[int]:
    """Greedy tokens of the answer to one question, without the end."""
    run, generation_config = exported.runners, exported.generation_config
    images = {name: value for name, value in inputs.items() if name.endswith("pixel_values")}
    embeds = run["embed_tokens"](input=inputs["input_ids"])
    if images:
        is_image = inputs["input_ids"] == exported.config.image_token_id
        embeds[is_image] = run["image_encoder"](**images).flatten(0, 1)

    text_config = exported.config.text_config
    heads = getattr(text_config, "num_key_value_heads", text_config.num_attention_heads)
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    cache, empty = DynamicCache(), torch.zeros(1, heads, 0, head_dim, dtype=embeds.dtype)
    for layer in range(text_config.num_hidden_layers):
        cache.update(empty, empty, layer)

    ends = generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    tokens: list[int] = []
    while len(tokens) < max_new_tokens:
        start = cache.get_seq_length()
        positions = torch.arange(start, start + embeds.shape[1])[None]
        outputs = run["language_model"](inputs_embeds=embeds, position_ids=positions, cache=cache)
        logits, cache = outputs.logits[0, -1].clone(), outputs.cache
        logits[generation_config.suppress_tokens or []] = float("-inf")
        token = int(logits.argmax())
        if token in ends:
            break
        tokens.append(token)
        embeds = run["embed_tokens"](input=torch.tensor([[token]]))
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--output", default="llava-hr-onnx", help="folder for the graphs")
    parser.add_argument("--image", default=str(HERE / "pictures" / "street.jpg"), help="file or URL")
    parser.add_argument("--question", default="What does the green sign say?")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="longest answer")
    arguments = parser.parse_args()
    packages = ("onnx", "onnxruntime", "onnxscript")
    if missing := [name for name in packages if find_spec(name) is None]:
        raise ImportError(f'ONNX needs {", ".join(missing)}: pip install ".[export]" in the checkout')
    try:
        from transformers.exporters import ExportedModel
    except ImportError:
        raise ImportError("Exporting needs transformers 5.24 or later: pip install --upgrade transformers") from None
    check_new_folder(arguments.output)

    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(arguments.model)
    content = [{"type": "image", "path": arguments.image}, {"type": "text", "text": arguments.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with new_folder(arguments.output) as folder:
        export(model, inputs).save_pretrained(folder)
        processor.save_pretrained(folder)
    exported = ExportedModel.from_pretrained(arguments.output)
    print(processor.decode(answer(exported, inputs, arguments.max_new_tokens), skip_special_tokens=True).strip())


if __name__ == "__main__":
    run_command(main)
