"""The library's tests on Molmo2, in its own code the closest relative."""

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
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2ImageProcessor,
    Molmo2Model,
    Molmo2Processor,
    Molmo2VideoProcessor,
)


class Molmo2Tester(VLMTester):
    config_class = Molmo2Config
    base_model_class = Molmo2Model
    conditional_generation_class = Molmo2ForConditionalGeneration
    image_token = "<im_patch>"
    image_tokens = 9 + 9  # of a low-resolution crop and of one crop

    def get_config(self) -> Molmo2Config:
        heads = {"num_attention_heads": self.num_attention_heads, "head_dim": self.head_dim}
        return Molmo2Config(
            vision_config={
                **self.vision_config,
                **heads,
                "num_key_value_heads": 4,
                "image_size": [self.tile_size, self.tile_size],
                "patch_size": self.patch_size,
            },
            adapter_config={
                **heads,
                "num_key_value_heads": 4,
                "vision_feature_layer": [1, 0],
                "hidden_size": self.hidden_size,
                "intermediate_size": self.intermediate_size,
                "text_hidden_size": self.hidden_size,
            },
            text_config=self.get_text_config("head_dim") | {"additional_vocab_size": 0},
            image_patch_id=self.image_token_id,
            image_start_token_id=21,
            image_end_token_id=22,
            low_res_image_start_token_id=23,
            frame_start_token_id=24,
            frame_end_token_id=25,
        )

    def get_image_inputs(self) -> dict[str, torch.Tensor]:
        side = self.patches_per_side
        patches = torch.arange(side**2).view(side // 2, 2, side // 2, 2).transpose(1, 2).reshape(-1, 4)
        crops = 2 * self.batch_size
        is_image = torch.arange(self.seq_length).expand(self.batch_size, -1) < self.image_tokens
        return {
            "pixel_values": torch.rand(crops, side**2, 3 * self.patch_size**2) * 2 - 1,
            "image_token_pooling": torch.cat([patches + side**2 * crop for crop in range(crops)]),
            "image_grids": torch.full((self.batch_size, 4), 3),
            "image_num_crops": torch.full((self.batch_size,), 2),
            "mm_token_type_ids": is_image.long(),
        }

    @classmethod
    def make_processor(cls) -> Molmo2Processor:
        tokens = (
            "<|image|> <|video|> <im_patch> <im_col> <im_start> <low_res_im_start> <frame_start> <im_end> <frame_end>"
        )
        tokenizer = make_tokenizer([*tokens.split(), "<im_low>"], eos_token="<|endoftext|>", pad_token="<|endoftext|>")
        size = {"height": cls.tile_size, "width": cls.tile_size}
        image_processor = Molmo2ImageProcessor(
            size=size, patch_size=cls.patch_size, overlap_margins=[1, 1], max_crops=2
        )
        video_processor = Molmo2VideoProcessor(size=size, patch_size=cls.patch_size)
        return Molmo2Processor(image_processor, video_processor, tokenizer, chat_template=make_template("<|image|>"))


class Molmo2ModelTest(VLMModelTest, unittest.TestCase):
    model_tester_class = Molmo2Tester

    def _create_text_training_batch(self, *args, **kwargs):
        batch = super()._create_text_training_batch(*args, **kwargs)
        return batch | {"mm_token_type_ids": torch.zeros_like(batch["input_ids"])}  # needed in training

    def _video_features_prepare_config_and_inputs(self):
        images = self.model_tester.get_image_inputs()
        inputs = {
            "pixel_values_videos": images["pixel_values"],
            "video_token_pooling": images["image_token_pooling"],
            "video_grids": torch.tensor([[2, 3, 3]]).repeat(self.model_tester.batch_size, 1),
        }
        return self.model_tester.get_config(), inputs


class Molmo2ProcessorTest(VLMProcessorTest, unittest.TestCase):
    model_tester_class = Molmo2Tester
    processor_class = Molmo2Processor


class Molmo2ImageProcessingTester(ImageProcessingTester):
    """The mixin finds the image processor by the name of the folder that this stands in."""


class Molmo2ImageProcessorTest(VLMImageProcessorTest, unittest.TestCase):
    image_processor_tester_class = Molmo2ImageProcessingTester
