"""Samples to batches: what the library's Trainer and TRL's trainers are given as `data_collator`."""

from typing import Any

import torch
from PIL import Image, ImageOps

from .layouts import BadSample, is_document, to_conversation


OF_TEMPLATE = 16  # tokens, more than a template writes around a document


class JinaVLMCollator:
    """
    Makes a batch of rows of a data set, in any of the layouts of [`layouts`].

    What is to be predicted are the assistants' turns, as the chat template marks them by `{% generation %}`, never
    what looks like such a turn in somebody's text; and after each of them `<|endoftext|>`, by which answers end.
    Between turns the release's template writes none: it is in the labels alone, in the place of what comes there.

    The images' tensors have tiles as their first dimension, over the whole batch: a loader must not cut a batch up
    along it. The Trainer's does not where the data set has a length; where it has none, pass
    `TrainingArguments(accelerator_config={"dispatch_batches": False})`. TRL needs `remove_unused_columns=False`, and
    `dataset_kwargs={"skip_prepare_dataset": True}` where the data set has no column of images.

    Args:
        processor ([`JinaVLMProcessor`]): Its chat template must have generation marks.
        max_length (`int`, *optional*): The longest sample, in tokens. Of a longer document, a text alone that nobody
            asked for, the beginning is taken. Other samples that are longer are an error: none of them is ever cut.

    Raises:
        ValueError: the chat template has no generation marks.
    """

    checks: list[str] = []  # names of what `check` does, on which measures depend

    def __init__(self, processor, max_length: int | None = None):
        template = processor.chat_template
        if "{% generation" not in str(template).replace("{%-", "{%"):
            raise ValueError(
                "The processor's chat template does not mark what assistants say ({% generation %}), "
                "so that labels cannot be told. Set `processor.chat_template` to this repository's "
                "chat_template.jinja, which writes the release's text."
            )
        self.processor, self.max_length = processor, max_length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_ids`, `attention_mask` and `labels` [rows, length], padded on the right; `pixel_values` [tiles, 3,
            378, 378] and `tile_positions` [tiles, 4] where there are images. `labels` are -100 where nothing is to be
            predicted. `input_ids` come first: the Trainer counts the samples of the first tensor.

        Raises:
            BadSample: a row cannot be used.
        """
        conversations = [self._cut(to_conversation(row)) for row in rows]
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            padding=True,
            padding_side="right",
        )
        for conversation, length in zip(conversations, batch["attention_mask"].sum(dim=1).tolist(), strict=True):
            self._check_length(conversation, length, self.max_length)
        inputs = {name: batch[name][:, : self.max_length] for name in ("input_ids", "attention_mask")}
        attended = inputs["attention_mask"].bool()
        answered = batch["assistant_masks"][:, : self.max_length].bool() & attended
        labels = inputs["input_ids"].masked_fill(~answered, -100)
        ends = answered[:, :-1] & ~answered[:, 1:] & attended[:, 1:]
        labels[:, 1:][ends] = self.processor.tokenizer.eos_token_id
        inputs["labels"] = labels
        return inputs | {name: batch[name] for name in ("pixel_values", "tile_positions") if name in batch}

    def _cut(self, conversation: list[dict]) -> list[dict]:
        """Of a document that may be longer than the model takes, the beginning. Shorter ones are cut when they are
        encoded."""
        if self.max_length is None or not is_document(conversation):
            return conversation
        tokenizer, text = self.processor.tokenizer, conversation[0]["content"][0]["text"]
        longest = tokenizer.model_max_length - OF_TEMPLATE
        if len(text.encode()) <= longest:  # no token is less than a byte
            return conversation
        kept = max(1, min(self.max_length, longest))
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        if len(offsets) <= kept:
            return conversation
        return [{"role": "assistant", "content": [{"type": "text", "text": text[: offsets[kept - 1][1]]}]}]

    def measure(self, row: dict[str, Any]) -> tuple[int, int]:
        """(tokens, tiles) that a row becomes, without making its tiles; its images are decoded to see that they can
        be. Where special tokens are typed in its texts the number of tokens may be a few off.

        Raises:
            BadSample: the row cannot be used.
        """
        conversation = to_conversation(row)
        self.check(conversation)
        images = [part["image"] for message in conversation for part in message["content"] if part["type"] == "image"]
        sizes = [_size(image) for image in images]
        ids = self.processor.tokenizer.apply_chat_template(
            conversation, chat_template=self.processor.chat_template, tokenize=True, return_dict=True
        )["input_ids"]
        try:
            numbers = self.processor._get_num_multimodal_tokens(sizes)
        except ValueError as error:  # too long for its width
            raise BadSample(str(error)) from error
        tokens = len(ids) + sum(numbers.num_image_tokens or []) - len(sizes)
        limit = self.processor.tokenizer.model_max_length if self.max_length is None else self.max_length
        self._check_length(conversation, tokens, limit)
        return min(tokens, limit), sum(numbers.num_image_patches or [])

    def check(self, conversation: list[dict]) -> None:
        """What a kind of training asks of a sample beside its layout.

        Raises:
            BadSample: it cannot be used.
        """

    def _check_length(self, conversation: list[dict], tokens: int, limit: int | None) -> None:
        can_be_cut = self.max_length is not None and is_document(conversation)
        if limit is not None and tokens > limit and not can_be_cut:
            raise BadSample(f"A sample has {tokens} tokens, more than {limit}.")


def _size(image: Image.Image) -> tuple[int, int]:
    """(height, width) once it is turned as its EXIF says."""
    try:
        image.load()
        width, height = ImageOps.exif_transpose(image).size
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # PNG's reader raises SyntaxError
        raise BadSample(f"An image cannot be decoded: {error}") from error
    return height, width
