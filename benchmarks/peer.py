"""The library's Qwen3-VL-2B with random weights: of similar size, with images at their own size."""

import time

import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .full_model import build
from .side_by_side import wait


NAME = "Qwen3-VL-2B"
# Of the published Qwen/Qwen3-VL-2B-Instruct: config.json and preprocessor_config.json
VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "out_hidden_size": 2048,
    "deepstack_visual_indexes": [5, 11, 17],
}
TEXT = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
IMAGES = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


class Peer:
    """`config` takes the place of the published sizes."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, config: Qwen3VLConfig | None = None):
        config = config or Qwen3VLConfig(vision_config=VISION, text_config=TEXT, tie_word_embeddings=True)
        self.model = build(lambda: Qwen3VLForConditionalGeneration(config), dtype, device)
        self.model.tie_weights()
        self.processor = Qwen2VLImageProcessorPil(**IMAGES)  # the one that needs no torchvision
        self.device = device

    @torch.inference_mode()
    def first_token(self, image: Image.Image, text_tokens: int) -> dict[str, float]:
        """Tokens of a prompt of an image and so much text, and seconds from the image to its first token."""
        start = time.perf_counter()
        inputs = self.processor(image, return_tensors="pt")
        config = self.model.config
        count = int(inputs["image_grid_thw"].prod()) // config.vision_config.spatial_merge_size**2
        ids = [
            config.vision_start_token_id,
            *(count * [config.image_token_id]),
            config.vision_end_token_id,
            *(text_tokens * [1000]),
        ]
        ids = torch.tensor([ids], device=self.device)
        self.model(
            input_ids=ids,
            mm_token_type_ids=(ids == config.image_token_id).int(),
            pixel_values=inputs["pixel_values"].to(self.device, self.model.dtype),
            image_grid_thw=inputs["image_grid_thw"].to(self.device),
            logits_to_keep=1,
        )
        wait(self.device)
        return {"tokens": ids.shape[1], "seconds": time.perf_counter() - start}
