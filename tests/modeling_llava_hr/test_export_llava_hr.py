# SPDX-License-Identifier: Apache-2.0
"""Export with `torch.export` and transformers' exporters: the logits and greedy tokens of the model itself."""

import logging

import pytest
import torch
from tiny_configs import IMAGE_TOKEN_ID, VIT_SIZES, make_inputs, make_model
from transformers import CLIPVisionConfig, DynamicCache

from modeling_llava_hr import modeling_llava_hr_vision


# What the exporters and ONNX's packages themselves call
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
BACKENDS = {
    # name: (exporter, config, package, options of the config, tolerance)
    "dynamo": ("DynamoExporter", "DynamoConfig", "torch", {}, 0.0),
    "onnx": ("OnnxExporter", "OnnxConfig", "onnxruntime", {}, 2e-4),
    # With a cache inside the graph, transformers 5.24 cannot return the outputs of a program that is called directly
    "openvino": ("OpenVINOExporter", "OpenVINOConfig", "openvino", {"stateful": False}, 2e-4),
    "executorch": ("ExecutorchExporter", "ExecutorchConfig", "executorch", {}, 2e-4),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("openvino", "executorch")]


@pytest.fixture
def small():
    """The miniature with half of its layers: tracing takes longer than anything else here."""
    vision_config = CLIPVisionConfig(**{**VIT_SIZES, "num_hidden_layers": 2})
    return make_model(vision_config=vision_config, mr_adapter_layers=[1])


@pytest.fixture(params=["dynamo", "onnx", *SLOW])
def backend(request, caplog):
    caplog.set_level(logging.ERROR, logger="torch")  # torch formats megabytes of traces for whoever listens
    caplog.set_level(logging.ERROR, logger="torch.__trace")
    exporters = pytest.importorskip("transformers.exporters", reason="this transformers has no exporters")
    if not hasattr(exporters, "ExportedModel"):
        pytest.skip("exported models run with transformers 5.24 and later")
    if request.param == "executorch" and request.function is test_exported_stages_generate_equal_greedy_tokens:
        pytest.skip("ExecuTorch 1.5 crashes on an empty cache, with transformers' own LLaVA as well")
    exporter, config, package, options, tolerance = BACKENDS[request.param]
    pytest.importorskip(package, reason="export needs the extra [export]")
    return getattr(exporters, exporter)(), getattr(exporters, config), options, tolerance


class ImageFeatures(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values, return_dict=True).pooler_output


def test_image_features_have_a_dynamic_number_of_images(monkeypatch):
    module, images = ImageFeatures(make_model()), torch.randn(5, 3, 128, 128)
    monkeypatch.setitem(modeling_llava_hr_vision._MAX_HIGH_RES_PIXELS, "cpu", 2 * 128**2)  # 5 images in 3 passes
    with torch.no_grad():
        program = torch.export.export(
            module, (images[:2],), dynamic_shapes=({0: torch.export.Dim("images", min=1, max=64)},)
        )
        traced = torch.jit.trace(module, (images,), check_trace=False)
        for number in (1, 2, 5):
            expected = module(images[:number])
            for exported in (program.module(), traced):
                torch.testing.assert_close(exported(images[:number]), expected, rtol=0, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    "dynamic", [pytest.param(False, id="static", marks=pytest.mark.slow), pytest.param(True, id="dynamic")]
)
def test_exported_models_have_equal_logits(small, backend, dynamic):
    exporter, config, options, tolerance = backend
    traced = make_inputs(2, 3)
    exported = exporter.export(small, traced, config(dynamic=dynamic, **options))
    if config.__name__ == "OpenVINOConfig":  # by itself it computes in bfloat16 where the CPU has it
        exported.to(config={"INFERENCE_PRECISION_HINT": "f32"})
    # other samples, other lengths, and another number of images
    for inputs in (traced, make_inputs(1, 0, 2, seed=1))[: 1 + dynamic]:
        kept = inputs["attention_mask"].bool()
        logits = exported(**inputs).logits[kept]
        torch.testing.assert_close(logits, small(**inputs).logits[kept], rtol=0, atol=tolerance)


@torch.no_grad()
def test_exported_stages_generate_equal_greedy_tokens(small, backend):
    exporter, config, options, _ = backend
    inputs = make_inputs(1)
    stages = exporter.export_for_generation(small, inputs, config(dynamic=True, **options)).runners
    # transformers encodes images before the graphs begin, as for its own LLaVA
    assert set(stages) == {"language_model", "lm_head", "decode"}
    embeds = small.get_input_embeddings()(inputs["input_ids"])
    features = small.get_image_features(inputs["pixel_values"]).pooler_output
    embeds[inputs["input_ids"] == IMAGE_TOKEN_ID] = features.flatten(0, 1)

    length, cache = embeds.shape[1], DynamicCache(config=small.config.text_config)
    prompt = stages["language_model"](
        inputs_embeds=embeds, position_ids=torch.arange(length)[None], attention_mask=None, cache=cache
    )
    logits, cache = stages["lm_head"](input=prompt.last_hidden_state), prompt.cache
    tokens = [int(logits[0, -1].argmax())]
    while len(tokens) < 8:
        position = torch.tensor([[length + len(tokens) - 1]])
        outputs = stages["decode"](input_ids=torch.tensor([tokens[-1:]]), position_ids=position, cache=cache)
        tokens.append(int(outputs.logits[0, -1].argmax()))
        cache = outputs.cache
    assert tokens == small.generate(**inputs, max_new_tokens=8, do_sample=False)[0, length:].tolist()
