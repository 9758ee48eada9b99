"""The library's tests on jina-vlm."""

import unittest
from pathlib import Path
from unittest import mock

import torch
from harness import VLMImageProcessorTest, VLMModelTest, VLMProcessorTest, VLMTester, make_tokenizer
from jina_vlm import (
    JinaVLMConfig,
    JinaVLMForConditionalGeneration,
    JinaVLMImageProcessor,
    JinaVLMModel,
    JinaVLMPreTrainedModel,
    JinaVLMProcessor,
)
from tests.test_image_processing_common import ImageProcessingTester
from tests.test_processing_common import MODALITY_TEST_SPECS


ROOT = Path(__file__).parents[5]
# Every test of the library that is not run on jina-vlm by our decision, and why.
SKIPPED = {
    "test_reverse_loading_mapping": "The released layout is read, not written: saving does not reverse the mapping.",
    "test_apply_chat_template_image": "It expects one row of pixels for each image, and passes settings of videos: "
    "ours are several tiles for each image, and unknown arguments are refused.",
    "test_new_models_require_torchvision_backend": "Our image processor needs no torchvision, and gives the same "
    "pixels with it and without it.",
    **dict.fromkeys(
        ("test_save_load_pretrained_additional_features", "test_image_processor_from_dict_with_kwargs_has_attributes"),
        "It turns off `do_normalize` or `do_convert_rgb`, which is refused: the model was trained with them.",
    ),
}
TILING = {"tile_size": VLMTester.tile_size, "patch_size": VLMTester.patch_size, "overlap_margin": 2, "max_tiles": 2}


class JinaVLMTester(VLMTester):
    config_class = JinaVLMConfig
    base_model_class = JinaVLMModel
    conditional_generation_class = JinaVLMForConditionalGeneration
    image_token = "<im_patch>"
    image_tokens = 9 + 3 * 4  # a thumbnail, and two tiles side by side that keep 3 x 2 each

    def get_config(self) -> JinaVLMConfig:
        return JinaVLMConfig(
            vision_config={
                **self.vision_config,
                "image_size": self.tile_size,
                "patch_size": self.patch_size,
            },
            text_config=self.get_text_config("head_dim"),
            vision_feature_layers=[1, 0],
            connector_num_attention_heads=4,
            connector_head_dim=8,
            connector_intermediate_size=64,
            overlap_margin=2,
            image_token_id=self.image_token_id,
            structural_token_ids=list(self.special_ids[:6]),
        )

    def get_image_inputs(self) -> dict[str, torch.Tensor]:
        tiles = torch.tensor([[-1, -1, 1, 2], [0, 0, 1, 2], [0, 1, 1, 2]])
        return {
            "pixel_values": torch.rand(len(tiles) * self.batch_size, 3, self.tile_size, self.tile_size) * 2 - 1,
            "tile_positions": tiles.repeat(self.batch_size, 1),
        }

    @classmethod
    def make_processor(cls) -> JinaVLMProcessor:
        tokens = ["<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<im_slice>"]
        end = "<|endoftext|>"
        tokenizer = make_tokenizer(tokens, bos_token=end, eos_token=end, pad_token=end, add_bos_token=True)
        template = (ROOT / "chat_template.jinja").read_text()
        return JinaVLMProcessor(JinaVLMImageProcessor(**TILING), tokenizer, chat_template=template)


class Skips:
    def setUp(self):
        for name, reason in SKIPPED.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)
        super().setUp()


class JinaVLMModelTest(Skips, VLMModelTest, unittest.TestCase):
    model_tester_class = JinaVLMTester
    skip_test_image_features_output_shape = (
        True  # two layers' features side by side: twice as wide as the test expects
    )

    def setUp(self):
        super().setUp()
        # Some tests ask for the released layout, by this argument. It is read, not written.
        save = JinaVLMPreTrainedModel.save_pretrained

        def save_in_our_layout(model, folder, *args, save_original_format=None, **kwargs):
            save(model, folder, *args, **kwargs)

        patch = mock.patch.object(JinaVLMPreTrainedModel, "save_pretrained", save_in_our_layout)
        patch.start()
        self.addCleanup(patch.stop)


class JinaVLMProcessorTest(Skips, VLMProcessorTest, unittest.TestCase):
    model_tester_class = JinaVLMTester
    processor_class = JinaVLMProcessor

    def setUp(self):
        super().setUp()
        # The mixin follows a setting to the image processor by a rescaling that ours does not have.
        setting = mock.patch.dict(MODALITY_TEST_SPECS["images"], init_time_kwargs={"max_tiles": 1})
        setting.start()
        self.addCleanup(setting.stop)

    def _check_modality_outputs(self, inputs, modality):
        self.assertEqual(inputs["tile_positions"][:, 2:].max(), 1)


class JinaVLMImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        super().__init__(parent, **TILING, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": JinaVLMImageProcessor}  # the library's name for what needs no torchvision


class JinaVLMImageProcessorTest(Skips, VLMImageProcessorTest, unittest.TestCase):
    image_processor_tester_class = JinaVLMImageProcessingTester

    # The mixin's expect one row of pixels for each image; these as many as there are tiles.

    def check_call(self, **kind):
        processor = JinaVLMImageProcessor(**self.image_processor_dict)
        images = self.image_processor_tester.prepare_image_inputs(**kind)
        for given in (images[:1], images):
            sizes = [processor.process_image(image).shape[1:] for image in given]
            tiles = sum(processor.get_number_of_image_patches(*size) for size in sizes)
            side = processor.tile_size
            self.assertEqual(processor(given, return_tensors="pt").pixel_values.shape, (tiles, 3, side, side))
        self.assertTrue(torch.equal(processor(images[0]).pixel_values, processor(images[:1]).pixel_values))

    def test_call_pil(self):
        self.check_call()

    def test_call_numpy(self):
        self.check_call(numpify=True)

    def test_call_pytorch(self):
        self.check_call(torchify=True)

    def test_call_numpy_4_channels(self):
        self.check_call(numpify=True, num_channels=4)
