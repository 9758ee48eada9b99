"""What docs/mlx.md proposes to mlx-vlm, as code: its port of jina-vlm, mended. Golden data say that it is right."""

import re

import mlx.core as mx
import numpy as np
from mlx_vlm.models.base import InputEmbeddingsFeatures
from mlx_vlm.models.jina_vlm import Model, ModelConfig, TextConfig, VisionConfig
from mlx_vlm.models.jina_vlm.image_processor import ImageProcessor
from mlx_vlm.models.jina_vlm.processing_jinavlm import JinaVLMProcessor
from PIL import Image


def sanitize(weights: dict) -> dict:
    """The released tensors under the names of mlx-vlm's modules; weights that have these already pass unchanged."""
    renamed = {}
    for name, value in weights.items():
        name = name.removeprefix("model.").replace("vision_model.vl_connector.", "vl_connector.")
        name = re.sub(r"_lnorm\.", "_norm.", name)
        name = re.sub(r"\.(qkv|q|kv)_w\.", r".\1.", name)
        name = re.sub(r"(language_model\..*ffn|projector)\.up\.", r"\1.gate_up.", name)
        renamed[re.sub(r"^lm_head", "language_model.lm_head", name)] = value
    for module in [name.removesuffix(".q_b") for name in renamed if name.endswith(".q_b")]:
        q, k, v = (renamed.pop(f"{module}.{letter}_b") for letter in "qkv")
        if module.endswith("pooling"):
            renamed |= {f"{module}.q.bias": q, f"{module}.kv.bias": mx.concatenate([k, v])}
        elif module.startswith("vision_model"):
            renamed[f"{module}.qkv.bias"] = mx.concatenate([q, k, v])
        # The text model's are all zero, and it has no place for them.
    return renamed


def keep_sizes(cls: type, part: str):
    """A `from_dict` that reads the release's nested settings: `load_model` makes each part's config by its own."""
    plain = cls.from_dict

    def from_dict(cls, settings: dict):
        if "block_config" in settings:
            return getattr(ModelConfig.from_dict({part: settings}), part)
        return plain(settings)

    return classmethod(from_dict)


def get_input_embeddings(self, input_ids: mx.array, pixel_values: mx.array | None = None, **kwargs):
    """All features at once: theirs are added one by one, each with a copy of all embeddings."""
    embeddings = self.language_model.embedding(input_ids)
    if pixel_values is not None:
        features = self.get_image_features(pixel_values, kwargs["image_masks"]).flatten(0, 2)
        places = np.array(kwargs["image_input_idx"]).reshape(-1)
        kept = np.flatnonzero(places >= 0)
        embeddings = embeddings.at[0, mx.array(places[kept])].add(features[mx.array(kept)])
    return InputEmbeddingsFeatures(inputs_embeds=embeddings)


def mend(patch) -> None:
    """`patch` is pytest's `monkeypatch`."""
    patch.setattr(Model, "sanitize", lambda self, weights: sanitize(weights))
    patch.setattr(Model, "get_input_embeddings", get_input_embeddings)
    patch.setattr(VisionConfig, "from_dict", keep_sizes(VisionConfig, "vision_config"))
    patch.setattr(TextConfig, "from_dict", keep_sizes(TextConfig, "text_config"))


def neighbors(length: int, resized: int) -> tuple:
    """The two pixels that each pixel of a resized line lies between, and the share of the second."""
    scale = np.float32(length) / np.float32(resized)
    centers = np.arange(resized, dtype=np.float32) + np.float32(0.5)
    places = (centers.astype(np.float64) * scale - 0.5).astype(np.float32).clip(min=0)
    first = places.astype(np.int64).clip(max=length - 1)
    return first, (first + 1).clip(max=length - 1), (places - first.astype(np.float32)).clip(0, 1)


def between(one: np.ndarray, other: np.ndarray, share: np.ndarray) -> np.ndarray:
    """In float32, with the first product not rounded, as a fused instruction computes it."""
    return (one.astype(np.float64) * (1 - share) + other * share).astype(np.float32)


class MendedImageProcessor(ImageProcessor):
    def resize_image(self, image: np.ndarray, size: tuple) -> tuple:
        """Bilinear, half-pixel centers, no antialiasing, of 8 bits, not rounded."""
        values = np.rint(image * 255).astype(np.float32)
        left, right, share = neighbors(values.shape[1], size[1])
        values = between(values[:, left], values[:, right], share[:, None])
        above, below, share = neighbors(values.shape[0], size[0])
        values = between(values[above], values[below], share[:, None, None])
        return values.clip(0, 255) / np.float32(255), np.ones(size, dtype=np.bool_)

    def crop_image(self, image: np.ndarray) -> tuple:
        fitted = np.rint(image * 255).astype(np.float32) / np.float32(255)  # half to even: 8 bits again
        patches, tokens, order, masks = super().crop_image(fitted)
        masks = masks.astype(np.float32)
        masks[-1] = 0.5  # between 0 and 1: row 1 of pad_embed is added to the last tile
        return patches, tokens, order, masks


class MendedProcessor(JinaVLMProcessor):
    tokenizer_class = JinaVLMProcessor.tokenizer_class

    def __init__(self, tokenizer, *args, **kwargs):
        super().__init__(tokenizer, *args, **kwargs)
        names = {"start": "<im_start>", "end": "<im_end>", "patch": "<im_patch>", "column": "<im_col>"}
        ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
        self._image_proc = MendedImageProcessor(**ids)

    def process_one(self, prompt: str, images: list[Image.Image] | None = None, inference_mode: bool = True) -> dict:
        images = [self._image_proc.process_image(image) for image in images or []]
        opening, *rest = prompt.split(self.image_token)
        if len(rest) != len(images):
            raise ValueError(
                f"The prompt has {len(rest)} times {self.image_token!r}, but there are {len(images)} images."
            )
        ids = self.encode(opening)
        if ids[:1] != [self.tokenizer.convert_tokens_to_ids("<|endoftext|>")]:
            ids = self.encode("<|endoftext|>") + ids
        places = []
        for image, text in zip(images, rest, strict=True):
            places.append(np.where(image["image_input_idx"] < 0, -1, image["image_input_idx"] + len(ids)))
            ids += image["image_tokens"].tolist() + (self.encode(text) if text else [])
        inputs = {"input_ids": mx.array([ids]), "attention_mask": mx.ones((1, len(ids)), dtype=mx.int32)}
        if images:  # the tiles of all, one after the other: images differ in how many they have
            inputs["pixel_values"] = mx.array(np.concatenate([image["pixel_values"] for image in images])[None])
            inputs["image_masks"] = mx.array(np.concatenate([image["image_masks"] for image in images])[None])
            inputs["image_input_idx"] = mx.array(np.concatenate(places)[None])
        return inputs
