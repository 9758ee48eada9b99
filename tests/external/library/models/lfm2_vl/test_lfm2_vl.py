"""The library's tests on LFM2-VL."""

import unittest

import torch
from harness import (
    VLMImageProcessorTest,
    VLMModelTest,
    VLMProcessorTest,
    VLMTester,
    make_template,
    make_tokenizer,
)
from tests.test_image_processing_common import ImageProcessingTester
from transformers import (
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlImageProcessor,
    Lfm2VlModel,
    Lfm2VlProcessor,
)


class Lfm2VlTester(VLMTester):
    config_class = Lfm2VlConfig
    base_model_class = Lfm2VlModel
    conditional_generation_class = Lfm2VlForConditionalGeneration
    image_token = "<image>"
    image_tokens = 9

    def get_config(self) -> Lfm2VlConfig:
        return Lfm2VlConfig(
            vision_config={
                **self.vision_config,
                "patch_size": self.patch_size,
                "num_patches": self.patches_per_side**2,
                "vision_use_head": False,
            },
            text_config=self.get_text_config() | {"block_multiple_of": 16, "layer_types": ["full_attention", "conv"]},
            projector_hidden_size=self.intermediate_size,
            image_token_id=self.image_token_id,
        )

    def get_image_inputs(self) -> dict[str, torch.Tensor]:
        patches = self.patches_per_side**2
        return {
            "pixel_values": torch.rand(self.batch_size, patches, 3 * self.patch_size**2) * 2 - 1,
            "pixel_attention_mask": torch.ones(self.batch_size, patches, dtype=torch.long),
            "spatial_shapes": torch.full((self.batch_size, 2), self.patches_per_side),
        }

    @classmethod
    def make_processor(cls) -> Lfm2VlProcessor:
        tokens = ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
        tokens += [f"<|img_row_{row}_col_{column}|>" for row in (1, 2) for column in (1, 2)]
        tokenizer = make_tokenizer(tokens, bos_token="<|startoftext|>", eos_token="<|im_end|>", pad_token="<|pad|>")
        image_processor = Lfm2VlImageProcessor(
            tile_size=cls.tile_size, encoder_patch_size=cls.patch_size, max_tiles=2, min_tiles=1, max_num_patches=36
        )
        return Lfm2VlProcessor(image_processor, tokenizer, chat_template=make_template("<image>"))


class Lfm2VlModelTest(VLMModelTest, unittest.TestCase):
    model_tester_class = Lfm2VlTester


class Lfm2VlProcessorTest(VLMProcessorTest, unittest.TestCase):
    model_tester_class = Lfm2VlTester
    processor_class = Lfm2VlProcessor


class Lfm2VlImageProcessingTester(ImageProcessingTester):
    """The mixin finds the image processor by the name of the folder that this stands in."""


class Lfm2VlImageProcessorTest(VLMImageProcessorTest, unittest.TestCase):
    image_processor_tester_class = Lfm2VlImageProcessingTester
