"""Turns with a model, as its chat template writes them. Each goes on from what it has in common with the cache of the
one before, so that no image is encoded twice."""

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
        settings: Arguments of the image processor, such as `max_tiles` and `do_resize`; None for its own.
    """

    def __init__(self, model, processor, max_new_tokens: int, **settings):
        self.model, self.processor = model, processor
        self.max_new_tokens, self.settings = max_new_tokens, settings
        self.reset()

    def reset(self) -> None:
        """Forget all turns and images."""
        self.begin_anew()
        self.ids, self.cache = None, None

    def begin_anew(self) -> None:
        """Forget all turns, but not how their images look: for another question about the same ones."""
        self.messages = []  # of turns that were answered
        self._asked = []  # these and the question that is being answered

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
        """Inputs of the next turn: the whole conversation, as the checkpoint's chat template writes it."""
        return self.prepare_turn(
            [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
        )

    def prepare_turn(self, content: list[dict]) -> BatchFeature:
        """As [`prepare`], for a turn of these parts."""
        self._asked = [*self.messages, {"role": "user", "content": content}]
        return self.processor.apply_chat_template(
            self._asked,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=dict(self.settings),
        )

    def remember(self, answer: str) -> None:
        """Make the question that was asked last, and its answer, part of the conversation."""
        self.messages = [*self._asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]

    def _rewind(self, ids: torch.Tensor) -> None:
        """Cut off of the cache what a prompt [1, length] has otherwise: a template may write a turn that is past in
        another way than one that is being answered."""
        if self.cache is None:
            return
        held = self.cache.get_seq_length()
        length = min(self.ids.shape[1], held, ids.shape[1] - 1)
        differences = (self.ids[0, :length] != ids[0, :length]).nonzero()
        length = int(differences[0]) if len(differences) else length
        self.cache.crop(length - held)

    def generate(self, inputs: BatchFeature, show: Callable[[str], None] = lambda text: None) -> Answer:
        """The answer to what [`prepare`] gave, as [`answer`] does."""
        listener = _Listener(self.processor.tokenizer, show)
        self._rewind(inputs["input_ids"])
        start = time.perf_counter()
        output = self.model.generate(
            **inputs.to(self.model.device),
            cache=self.cache,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            streamer=listener,
            return_dict_in_generate=True,
        )
        end = time.perf_counter()
        self.ids, self.cache = output.sequences.cpu(), output[CACHE_NAME]
        new = self.ids[0, inputs["input_ids"].shape[1] :]
        text = self.processor.decode(new, skip_special_tokens=True).strip()
        self.remember(text)
        return Answer(
            text=text,
            prompt_tokens=inputs["input_ids"].shape[1],
            tokens=len(new),
            is_cut_off=not find_ends(self.model, new)[-1].item(),
            seconds_to_first_token=round(listener.times[1] - start, 3),
            seconds=round(end - start, 3),
        )


def find_ends(model, ids: torch.Tensor) -> torch.Tensor:
    """Which tokens end an answer of the model, by its `generation_config`: bool, as `ids`."""
    end = model.generation_config.eos_token_id
    return torch.isin(ids, ids.new_tensor([] if end is None else end))


def describe_images(processor, images: list[Image.Image], **settings) -> list[dict[str, int]]:
    """What becomes of each with these arguments of the image processor: `width` and `height` in pixels, `rows` and
    `columns` of tiles, `tiles` with the thumbnail, and `tokens` of the prompt."""
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
