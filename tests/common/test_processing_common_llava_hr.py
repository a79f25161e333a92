# SPDX-License-Identifier: Apache-2.0
"""transformers' common processor tests on LLaVA-HR."""

import unittest
from pathlib import Path

from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.testing_utils import require_torch, require_vision
from transformers_tests.test_processing_common import ProcessorTesterMixin

from modeling_llava_hr import LlavaHrProcessor
from modeling_llava_hr.image_processing_llava_hr import LlavaHrImageProcessor


RECORDED = Path(__file__).resolve().parents[1] / "fixtures" / "reference" / "stage2-1024" / "checkpoint"


@require_torch
@require_vision
class LlavaHrProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = LlavaHrProcessor

    @classmethod
    def _setup_image_processor(cls):
        # 4 image tokens, so that the texts stay below the maximum lengths that the suite passes
        return LlavaHrImageProcessor(size={"height": 64, "width": 64}, low_res_size=28)

    @classmethod
    def _setup_tokenizer(cls):
        original = LlamaTokenizer.from_pretrained(RECORDED)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=original.backend_tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            pad_token="<unk>",
            padding_side="left",
        )
        tokenizer.add_tokens("<image>", special_tokens=True)
        return tokenizer
