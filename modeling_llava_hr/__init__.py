# SPDX-License-Identifier: Apache-2.0
"""LLaVA-HR for transformers. Importing this package makes it known to the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from .configuration_llava_hr import (
    LlavaHrConfig,
    LlavaHrVisionConfig,
    get_low_res_size,
    get_num_image_tokens,
    get_unpadded_cells,
)
from .image_processing_llava_hr import LlavaHrImageProcessor
from .image_processing_pil_llava_hr import LlavaHrImageProcessorPil
from .modeling_llava_hr import LlavaHrForConditionalGeneration, LlavaHrModel, LlavaHrVisionModel
from .processing_llava_hr import LlavaHrProcessor


AutoConfig.register(LlavaHrConfig.model_type, LlavaHrConfig, exist_ok=True)
AutoConfig.register(LlavaHrVisionConfig.model_type, LlavaHrVisionConfig, exist_ok=True)
AutoModel.register(LlavaHrConfig, LlavaHrModel, exist_ok=True)
AutoModel.register(LlavaHrVisionConfig, LlavaHrVisionModel, exist_ok=True)
AutoModelForImageTextToText.register(LlavaHrConfig, LlavaHrForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(LlavaHrConfig, LlavaHrForConditionalGeneration, exist_ok=True)
AutoProcessor.register(LlavaHrConfig, LlavaHrProcessor, exist_ok=True)
AutoImageProcessor.register(
    LlavaHrConfig,
    image_processor_classes={"torchvision": LlavaHrImageProcessor, "pil": LlavaHrImageProcessorPil},
    exist_ok=True,
)
# `register` does not extend these, in which `transformers serve` and TRL's OnlineDPOTrainer look a model up
for _names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    _names[LlavaHrConfig.model_type] = LlavaHrForConditionalGeneration.__name__

__all__ = [
    "LlavaHrConfig",
    "LlavaHrForConditionalGeneration",
    "LlavaHrImageProcessor",
    "LlavaHrImageProcessorPil",
    "LlavaHrModel",
    "LlavaHrProcessor",
    "LlavaHrVisionConfig",
    "LlavaHrVisionModel",
    "get_low_res_size",
    "get_num_image_tokens",
    "get_unpadded_cells",
]
