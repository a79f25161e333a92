# SPDX-License-Identifier: Apache-2.0
"""transformers' common image processor tests on both backends of LLaVA-HR's image processor."""

import unittest

from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.testing_utils import require_torch, require_vision
from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

from modeling_llava_hr.image_processing_llava_hr import LlavaHrImageProcessor
from modeling_llava_hr.image_processing_pil_llava_hr import LlavaHrImageProcessorPil


class LlavaHrImageProcessingTester(ImageProcessingTester):
    # A constructor of its own, since that of the base class takes other arguments in every few releases
    def __init__(self, parent):
        self.parent = parent
        self.batch_size = 7
        self.num_channels = 3
        self.min_resolution = 30
        self.max_resolution = 80
        self.size = {"height": 64, "width": 64}
        self.image_processing_classes = self._get_image_processing_classes()

    def _get_image_processing_classes(self):
        return {"torchvision": LlavaHrImageProcessor, "pil": LlavaHrImageProcessorPil}

    def prepare_image_processor_dict(self):
        return {
            "size": self.size,
            "low_res_size": 56,
            "image_aspect_ratio": "pad",
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": OPENAI_CLIP_MEAN,
            "image_std": OPENAI_CLIP_STD,
            "do_convert_rgb": True,
        }


@require_torch
@require_vision
class LlavaHrImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = LlavaHrImageProcessingTester
    test_cast_dtype = True

    def setUp(self):
        self.image_processor_tester = LlavaHrImageProcessingTester(self)

    def test_call_numpy_4_channels(self):
        """The suite wants four channels kept, but both towers take three: they are refused unless converted."""
        self.image_processor_tester.num_channels = 4
        images = self.image_processor_tester.prepare_image_inputs(numpify=True)
        for image_processing_class in self.image_processing_classes.values():
            image_processor = image_processing_class(**self.image_processor_dict)
            with self.assertRaisesRegex(ValueError, "4 channels.*do_convert_rgb"):
                image_processor(images, do_convert_rgb=False, return_tensors="pt")
            self.assertEqual(image_processor(images, return_tensors="pt").pixel_values.shape[1], 3)

    @unittest.skip("torchvision is a dependency of this package, so that neither backend has to do without it")
    def test_pil_can_run_without_torchvision(self):
        pass

    test_pil_can_load_without_torchvision = test_pil_can_run_without_torchvision  # its name in older versions
