# SPDX-License-Identifier: Apache-2.0
"""
transformers' common model and configuration tests on LLaVA-HR.

Some suites of transformers' own models are missing. `GenerationTesterMixin` and `PipelineTesterMixin`, or files that
they need, are not in the source release. `TrainingTesterMixin` and the mixins for tensor and expert parallelism and
for FSDP are for text-only models; `test_training_overfit` below is the counterpart with images.
"""

import unittest

import pytest
import transformers
from packaging.version import Version
from transformers import TimmWrapperConfig, is_torch_available
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.testing_utils import require_torch, torch_device
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, floats_tensor, global_rng, ids_tensor

from modeling_llava_hr import LlavaHrConfig, LlavaHrForConditionalGeneration, LlavaHrModel


if is_torch_available():
    import torch


@pytest.fixture(autouse=True, scope="module")
def listed_by_transformers():
    """The suites look up by class name which models take labels; a model outside transformers has to be added."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(MODEL_MAPPING_NAMES, "llava_hr", "LlavaHrModel")
        yield


class LlavaHrModelTester:
    """Tiny model with both pathways and an MR-Adapter, and matching inputs: one image in each text."""

    # `test_eager_matches_sdpa_inference` takes 7 samples and would add texts that have no image
    batch_size = 7
    is_training = True
    image_token_id = 4
    image_size = 56
    high_res_image_size = 64
    patch_size = 14
    num_hidden_layers = 2

    def __init__(self, parent):
        self.parent = parent
        self.vision_config = {
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": 2,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "projection_dim": 32,
        }
        self.text_config = {
            "model_type": "llama",
            "vocab_size": 99,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
        }
        self.high_res_vision_config = TimmWrapperConfig(
            architecture="convnext_tiny",
            do_pooling=False,
            model_args={"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 48]},
        )
        # read by the suites
        self.hidden_size = self.text_config["hidden_size"]
        self.num_attention_heads = self.text_config["num_attention_heads"]
        self.vocab_size = self.text_config["vocab_size"]
        self.num_image_tokens = (self.image_size // self.patch_size) ** 2
        self.seq_length = 7 + self.num_image_tokens
        self.encoder_seq_length = self.seq_length

    def get_config(self):
        return LlavaHrConfig(
            vision_config=self.vision_config,
            high_res_vision_config=self.high_res_vision_config.to_dict(),
            text_config=self.text_config,
            image_token_id=self.image_token_id,
            mr_adapter_layers=[1],
        )

    def prepare_config_and_inputs_for_common(self):
        # 0 to 4 are special tokens
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 5) + 5
        input_ids[:, 1 : 1 + self.num_image_tokens] = self.image_token_id
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": floats_tensor([self.batch_size, 3, self.high_res_image_size, self.high_res_image_size]),
        }
        return self.get_config(), inputs


@require_torch
# One test looks for this warning
@pytest.mark.filterwarnings("default:`past_key_values` is deprecated:FutureWarning")
class LlavaHrModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (LlavaHrModel, LlavaHrForConditionalGeneration)
    additional_model_inputs = ["pixel_values"]
    _is_composite = True

    def setUp(self):
        # The suite draws its inputs from a generator of its own
        global_rng.seed(0)
        self.model_tester = LlavaHrModelTester(self)
        self.config_tester = ConfigTester(self, config_class=LlavaHrConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skipIf(
        Version(transformers.__version__) < Version("5.20"),
        "older versions apply the top-level choice to a submodel whose configuration is not a registered sub-config",
    )
    def test_can_set_attention_dynamically_composite_model(self):
        super().test_can_set_attention_dynamically_composite_model()

    def test_training_overfit(self):
        """The same question on two images has two answers: that can only be learned from the images."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        inputs = {name: values[:2].to(torch_device) for name, values in inputs.items()}
        inputs["input_ids"][1] = inputs["input_ids"][0]
        answers = torch.tensor([[10, 11, 12], [20, 21, 22]], device=torch_device)
        num_answer_tokens = answers.shape[1]
        inputs["input_ids"][:, -num_answer_tokens:] = answers
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -num_answer_tokens:] = answers

        model = LlavaHrForConditionalGeneration(config).to(torch_device).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(100):
            loss = model(**inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        # The mixin's threshold
        self.assertLess(losses[-1], 0.1 * losses[0])

        inputs["input_ids"] = inputs["input_ids"][:, :-num_answer_tokens]
        inputs["attention_mask"] = inputs["attention_mask"][:, :-num_answer_tokens]
        generated = model.eval().generate(**inputs, max_new_tokens=num_answer_tokens, do_sample=False)
        self.assertListEqual(generated[:, -num_answer_tokens:].tolist(), answers.tolist())
