"""Turns with a model. Each goes on from the cache of the one before, so that no image is encoded twice."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jina_vlm.compatibility_jina_vlm import CACHE_NAME
from PIL import Image
from transformers import BatchFeature, TextStreamer


@dataclass(frozen=True)
class Answer:
    """`is_cut_off`: it has as many tokens as were allowed, and did not end by itself."""

    text: str
    prompt_tokens: int
    tokens: int
    is_cut_off: bool
    seconds_to_first_token: float
    seconds: float


class _Listener(TextStreamer):
    """Notes when tokens come, and hands on their text, from its first letter on."""

    def __init__(self, tokenizer, show: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.has_begun = show, False
        self.times = []  # the first is that of the prompt

    def put(self, value):
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False):
        text = text if self.has_begun else text.lstrip()
        if text:
            self.has_begun = True
            self.show(text)


class Conversation:
    """
    A chat with a model, greedy.

    Args:
        model, processor: Of one checkpoint.
        max_new_tokens (`int`): Longest answer.
        max_tiles (`int`, *optional*): At most so many tiles of an image beside its thumbnail.
    """

    def __init__(self, model, processor, max_new_tokens: int, max_tiles: int | None = None):
        self.model, self.processor = model, processor
        self.max_new_tokens, self.max_tiles = max_new_tokens, max_tiles
        self.reset()

    def reset(self) -> None:
        """Forget all turns and images."""
        self.ids, self.cache = None, None

    def answer(
        self, question: str, images: list[Image.Image], show: Callable[[str], None] = lambda text: None
    ) -> Answer:
        """
        The next turn.

        Args:
            images: Those that are new, before the question.
            show: Gets the answer's text, piece by piece, while it is generated.

        Raises:
            ValueError: the conversation would be longer than the model's positions, or an image cannot be used.
        """
        return self.generate(self.prepare(question, images), show)

    def prepare(self, question: str, images: list[Image.Image]) -> BatchFeature:
        """Inputs of the next turn: token ids of the whole conversation, and the new images alone."""
        inputs = prepare_turn(self.processor, question, images, self.max_tiles)
        if self.ids is not None:
            # A turn's text is the same wherever it stands. It opens with <|endoftext|>, which ended the last one.
            ids = torch.cat([self.ids, inputs["input_ids"][:, 1:]], dim=1)
            limit = self.processor.tokenizer.model_max_length
            if ids.shape[1] > limit:
                raise ValueError(
                    f"The conversation has {ids.shape[1]} tokens, the model takes {limit}. Begin a new one."
                )
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return BatchFeature(inputs)

    def generate(self, inputs: BatchFeature, show: Callable[[str], None] = lambda text: None) -> Answer:
        """The answer to what [`prepare`] gave, as [`answer`] does."""
        listener = _Listener(self.processor.tokenizer, show)
        start = time.perf_counter()
        output = self.model.generate(
            **inputs.to(self.model.device),
            **{CACHE_NAME: self.cache},
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            streamer=listener,
            return_dict_in_generate=True,
        )
        end = time.perf_counter()
        self.ids, self.cache = output.sequences.cpu(), output[CACHE_NAME]
        new = self.ids[0, inputs["input_ids"].shape[1] :]
        is_cut_off = new[-1].item() != self.processor.tokenizer.eos_token_id
        if is_cut_off:
            self.ids = torch.nn.functional.pad(self.ids, (0, 1), value=self.processor.tokenizer.eos_token_id)
        return Answer(
            text=self.processor.decode(new, skip_special_tokens=True).strip(),
            prompt_tokens=inputs["input_ids"].shape[1],
            tokens=len(new),
            is_cut_off=is_cut_off,
            seconds_to_first_token=round(listener.times[1] - start, 3),
            seconds=round(end - start, 3),
        )


def prepare_turn(processor, question: str, images: list[Image.Image], max_tiles: int | None = None) -> BatchFeature:
    """Model inputs of one user's turn: images, then text."""
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={} if max_tiles is None or not images else {"max_tiles": max_tiles},
    )


def describe_images(processor, images: list[Image.Image], max_tiles: int | None = None) -> list[dict[str, int]]:
    """What becomes of each: `width` and `height` in pixels, `rows` and `columns` of tiles, `tiles` with the thumbnail,
    and `tokens` of the prompt."""
    settings = {} if max_tiles is None else {"max_tiles": max_tiles}
    described = []
    for image in images:
        size = (image.height, image.width)
        rows, columns = processor.image_processor.get_tiling(*size, **settings)[1]
        tokens = processor._get_num_multimodal_tokens([size], **settings)["num_image_tokens"][0]
        described.append(
            {
                "width": image.width,
                "height": image.height,
                "rows": rows,
                "columns": columns,
                "tiles": 1 + rows * columns,
                "tokens": tokens,
            }
        )
    return described
