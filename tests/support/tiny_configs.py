# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA-HR with random weights, its parts, and inputs for it."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast, TimmWrapperConfig

from modeling_llava_hr import LlavaHrConfig, LlavaHrForConditionalGeneration


IMAGE_TOKEN_ID = 120
SIDE, TOKENS = 128, 16  # 4 x 4 positions of 32 pixels; 4 x 4 patches of 14 pixels in a view of 56


VIT_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
TEXT_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def make_config(**kwargs) -> LlavaHrConfig:
    defaults = {
        "vision_config": CLIPVisionConfig(**VIT_SIZES),
        "high_res_vision_config": TimmWrapperConfig(
            architecture="convnext_large_mlp",
            do_pooling=False,
            model_args={"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 48]},
        ),
        "text_config": LlamaConfig(**TEXT_SIZES, vocab_size=128, max_position_embeddings=512, pad_token_id=0),
        "image_token_id": IMAGE_TOKEN_ID,
        "mr_adapter_layers": [1, 2, 3],
    }
    return LlavaHrConfig(**{**defaults, **kwargs})


def make_model(**kwargs) -> LlavaHrForConditionalGeneration:
    """Random weights, large enough that images and gates matter: adapters start at zero."""
    torch.manual_seed(0)
    model = LlavaHrForConditionalGeneration(make_config(**kwargs)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def make_inputs(*images_per_sample: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded batch with the given number of images in each sample; no two samples are alike."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index, num_images in enumerate(images_per_sample):
        ids = torch.randint(3, 100, (5 + index,), generator=generator).tolist()
        for _ in range(num_images):
            ids += [IMAGE_TOKEN_ID] * TOKENS + torch.randint(3, 100, (3,), generator=generator).tolist()
        samples.append(ids)
    length = max(len(ids) for ids in samples)
    inputs = {
        "input_ids": torch.tensor([[0] * (length - len(ids)) + ids for ids in samples]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in samples]),
    }
    if num_images := sum(images_per_sample):
        inputs["pixel_values"] = torch.randn(num_images, 3, SIDE, SIDE, generator=generator)
    return inputs


def take_sample(inputs: dict[str, torch.Tensor], images_per_sample: tuple[int, ...], index: int) -> dict:
    """One sample of a batch of `make_inputs`, without padding and with its own images alone."""
    keep = inputs["attention_mask"][index].bool()
    sample = {"input_ids": inputs["input_ids"][index : index + 1, keep]}
    sample["attention_mask"] = torch.ones_like(sample["input_ids"])
    start = sum(images_per_sample[:index])
    if images_per_sample[index]:
        sample["pixel_values"] = inputs["pixel_values"][start : start + images_per_sample[index]]
    return sample


def make_bpe_tokenizer(*more_tokens: str) -> PreTrainedTokenizerFast:
    """
    Byte-level BPE, as of GPT-2, Llama 3 and Qwen: no space before the first word, no token for the start of a text,
    none for padding or unknown text.
    """
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.add_tokens(list(more_tokens), special_tokens=True)
    return tokenizer
