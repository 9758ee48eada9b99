# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Processor of jina-vlm: text and images become model inputs."""

import re
import threading
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack

from .compatibility_jina_vlm import put_into_package
from .control_tokens_jina_vlm import Edit, control_tokens, encode, in_source, mark, mark_chat, typed_tokens
from .conversion_jina_vlm import STRUCTURAL_TOKENS
from .image_processing_jina_vlm import JinaVLMImageProcessor, JinaVLMImageProcessorKwargs, flatten
from .messages_jina_vlm import check_conversation


class JinaVLMTextKwargs(TextKwargs, total=False):
    sanitize_control_tokens: bool | None  # the library's own in 5.24


class JinaVLMProcessorKwargs(ProcessingKwargs, total=False):
    text_kwargs: JinaVLMTextKwargs
    images_kwargs: JinaVLMImageProcessorKwargs
    _defaults = {}  # read by the library before 5.20


_ON_REQUEST = ("return_mm_token_type_ids", "return_text_replacement_offsets")
# Known to `apply_chat_template` itself
_TEMPLATE_ARGUMENTS = ("return_tensors", "load_audio_from_video")


class JinaVLMProcessor(ProcessorMixin):
    r"""
    Puts images and text together. Each `<|image|>` in a text stands for one image, and becomes

        <im_start> 14 x (14 x <im_patch> <im_col>) <im_end>   its thumbnail
        <im_start>  R x ( C x <im_patch> <im_col>) <im_end>   its tiles

    with one `<im_patch>` for each image feature of the model. `<|endoftext|>` opens every sequence.

    Through [`~JinaVLMProcessor.apply_chat_template`] text of messages stays text: the checkpoint's own special tokens in it
    (`<|image|>`, `<|endoftext|>`, ...) are encoded like any other characters. In `text=` the caller is in charge. Tokens
    that somebody adds to the tokenizer (`<box>`) stay tokens in both, unless `tokenizer.chat_control_tokens` names them.

    Args:
        image_processor ([`JinaVLMImageProcessor`]): Makes tiles of images.
        tokenizer (`PreTrainedTokenizerFast`): Must know the structural tokens.
        chat_template (`str`, *optional*): A Jinja template.
        always_start_with_space (`bool`, *optional*, defaults to `True`): Given to the chat template, as the released
            checkpoint's expects it. This repository's template does not use it.

    Raises:
        ValueError: the tokenizer lacks a structural token.
    """

    valid_processor_kwargs = JinaVLMProcessorKwargs
    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor: JinaVLMImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: str | None = None,
        always_start_with_space: bool = True,
    ):
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in STRUCTURAL_TOKENS if token not in vocabulary]:
            raise ValueError(f"The tokenizer lacks {', '.join(missing)}: it does not belong to a jina-vlm checkpoint.")
        self.always_start_with_space = always_start_with_space
        self.auto_map = {
            "AutoProcessor": "processing_jina_vlm.JinaVLMProcessor"
        }  # written by saving, dropped by loading
        self.image_token = "<|image|>"
        self.image_token_id = vocabulary[self.image_token]
        # What an expansion is made of; `mm_token_type_ids` marks these.
        self.image_token_ids = [vocabulary[t] for t in ("<im_start>", "<im_end>", "<im_patch>", "<im_col>")]
        self.patch_token_id = vocabulary["<im_patch>"]
        if tokenizer.bos_token is None:
            # A release's tokenizer adds nothing; its processor puts `<|endoftext|>` in front. Engines encode prompts by the
            # tokenizer alone, which is to do the same, and is saved so. Chats have theirs from the template; the library, vLLM,
            # lm-eval and TRL encode them with `add_special_tokens=False`. Whoever does not, for a chat rendered to a string,
            # gets two, as with Llama's and Gemma's tokenizers: the price of prompts that are right by default.
            tokenizer.bos_token = tokenizer.eos_token
            tokenizer.add_bos_token = True
        super().__init__(image_processor, tokenizer)
        templates = chat_template or tokenizer.chat_template
        if isinstance(templates, dict):
            self.chat_template = {name: self._self_contained(template) for name, template in templates.items()}
        else:
            self.chat_template = templates and self._self_contained(templates)

    # ------------------------------------------------------------------------------------------------------------------
    # Text and images to model inputs
    # ------------------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[JinaVLMProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: Images, as [`JinaVLMImageProcessor`] takes them: one, a list, or a list for each text.
            text (`str` or `list[str]`, *optional*): Prompts, with one `<|image|>` for each image. `<|endoftext|>` is put in
                front of those that do not begin with it, unless `add_special_tokens=False`.
            kwargs: Arguments of the tokenizer's call (`padding`, `truncation`, `max_length`, ...) and of the image
                processor's (`max_tiles`, `min_pixels`, `max_pixels`, ...); `return_tensors`; `return_mm_token_type_ids`;
                `return_text_replacement_offsets`; `sanitize_control_tokens`, whether control tokens typed in `text` are
                marked, as `apply_chat_template` marks them. Several texts are padded, on the left by default, when
                `return_tensors` is given.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` [texts, length], and with images `pixel_values`
            [tiles, 3, 378, 378] and `tile_positions` [tiles, 4], in the order of the images in the texts. On request
            `mm_token_type_ids` [texts, length], 1 for the tokens of images, and `offset_mapping`: the characters of
            each token in the text as it was given, where all tokens of an image stand for its `<|image|>`. Together with
            `text_replacement_offsets`, the library's record of what became of each `<|image|>`, they are characters of the
            text with its images written out, as of the library's own processors.

        Raises:
            ValueError, TypeError: images and their places in the texts do not match, a prompt is longer than the model
                can take, truncation would cut an image, a video or an unknown argument was given, or an image cannot be
                used.
        """
        media = [kwargs.pop(name, None) for name in ("videos", "audio", "audios")]
        if any(item is not None and not (isinstance(item, list) and not item) for item in media):
            raise ValueError("jina-vlm takes text and images; got a video or audio. Pass a video's frames as images.")
        self._check_kwargs(kwargs)
        if text is None and images is None:
            raise ValueError("Expected `text`, `images` or both, got neither.")
        texts = [text] if isinstance(text, str) else list(text) if text is not None else None
        if texts is not None and not all(isinstance(sample, str) for sample in texts):
            raise TypeError(f"`text` must be a string or a list of strings, got {text!r}.")
        if texts == []:
            raise ValueError("Got an empty list of texts.")

        images = self._flat_images(images, texts)
        kwargs = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        data, replacements = {}, []
        if images:
            data, replacements = self._process_images(images, **kwargs["images_kwargs"])
        if texts is None:
            return BatchFeature(data, tensor_type=kwargs["images_kwargs"].get("return_tensors"))
        # From 5.20 on the library keeps these two beside the groups.
        on_request = {name: kwargs[name] for name in _ON_REQUEST if name in kwargs}
        text_inputs = self._encode(texts, replacements, **{**kwargs["text_kwargs"], **on_request})
        return BatchFeature(
            {**text_inputs, **data},
            tensor_type=kwargs["text_kwargs"].get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    def _check_kwargs(self, kwargs: dict) -> None:
        """The library would ignore what it does not know."""
        groups = self.valid_processor_kwargs.__annotations__
        for group in ("text_kwargs", "images_kwargs"):
            _refuse_unknown(kwargs.get(group) or {}, {*groups[group].__annotations__, *_ON_REQUEST}, f" in `{group}`")
        _refuse_unknown(kwargs, self._own_kwargs | {"common_kwargs"})

    def _flat_images(self, images: Any, texts: list[str] | None) -> list:
        """The images as a flat list, in the order of their places in the texts, whose numbers must agree."""
        if images is None:
            images = []
        elif isinstance(images, (list, tuple)) and not images:
            raise ValueError("Got an empty list of images. Leave `images` out where there are none.")
        nested = isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images)
        images = self.image_processor.fetch_images(images)
        if texts is None:
            return flatten(images)
        places = [sample.count(self.image_token) for sample in texts]
        if nested and len(images) != len(texts):
            raise ValueError(
                f"Got lists of images for {len(images)} samples, but {len(texts)} texts: {self.image_token} tokens in the prompts should be the same as the number of images."
            )
        if nested:
            given = [len(flatten(sample)) for sample in images]
        else:
            # Taken in order: each text gets what it asks for while there is some, the last one what is left.
            left, given = len(flatten(images)), []
            for place in places:
                given.append(min(place, left))
                left -= given[-1]
            given[-1] += left
        for index, (place, number) in enumerate(zip(places, given, strict=True)):
            if place != number:
                raise ValueError(
                    f"Sample {index} has {place} {self.image_token} in its text but {number} images. Write {self.image_token} once for each image."
                )
        return flatten(images)

    def _encode(
        self,
        texts: list[str],
        replacements: list[str],
        padding: bool | str | None = None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_offsets_mapping: bool = False,
        return_mm_token_type_ids: bool = False,
        return_text_replacement_offsets: bool = False,
        add_special_tokens: bool | None = None,
        sanitize_control_tokens: bool = False,
        verbose: bool = True,
        **unsupported,
    ) -> dict[str, Any]:
        """Texts to token ids, padded. Nothing is set on the tokenizer, which other threads may be using."""
        if unsupported := sorted(name for name, value in unsupported.items() if value):
            raise TypeError(
                f"{', '.join(unsupported)}: not supported with images. Call `processor.tokenizer` for text alone."
            )
        limit = self.tokenizer.model_max_length if max_length is None else max_length
        if limit < 1:
            raise ValueError(f"`max_length` must be at least 1, got {max_length}.")
        bos = self.tokenizer.bos_token or self.tokenizer.eos_token
        expanded, replacement_offsets = self.get_text_with_replacements(list(texts), replacements)
        if sum(map(len, replacement_offsets)) != len(replacements):
            raise ValueError(
                f"A {self.image_token} stands behind U+F0000, by which the library marks typed ones. Take that character out."
            )
        encodings = encode(self.tokenizer, expanded, self._control_tokens if sanitize_control_tokens else None)
        rows: dict[str, list] = {"input_ids": [], "offset_mapping": []}
        for index, (ids, offsets) in enumerate(encodings):
            if replacement_offsets and not return_text_replacement_offsets:
                edits = [Edit(item["new_span"], item["span"]) for item in replacement_offsets[index]]
                offsets = [in_source(offset, edits) for offset in offsets]
            if add_special_tokens in (None, True) and not texts[index].startswith(bos):
                ids, offsets = [self.tokenizer.convert_tokens_to_ids(bos), *ids], [(0, 0), *offsets]
            if truncation and truncation != "do_not_truncate" and len(ids) > limit:
                kept = slice(limit) if self.tokenizer.truncation_side == "right" else slice(-limit, None)
                if ids[kept].count(self.patch_token_id) != ids.count(self.patch_token_id):
                    raise ValueError(
                        f"Sample {index} has {len(ids)} tokens; truncation to {limit} would cut an image. Raise `max_length`, or take fewer or smaller images (`max_tiles`)."
                    )
                ids, offsets = ids[kept], offsets[kept]
            if len(ids) > self.tokenizer.model_max_length:
                raise ValueError(
                    f"Sample {index} has {len(ids)} tokens, the model takes {self.tokenizer.model_max_length}. Shorten the text, or take fewer or smaller images (`max_tiles`)."
                )
            rows["input_ids"].append(ids)
            rows["offset_mapping"].append(offsets)

        if padding is None:
            padding = return_tensors is not None and len(texts) > 1
        padded = self.tokenizer.pad(
            {"input_ids": rows["input_ids"]},
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side or "left",
            return_attention_mask=return_attention_mask,
            verbose=False,
        )
        result = dict(padded)
        if return_offsets_mapping:
            result["offset_mapping"] = [
                # of no width; and in order, as transformers before 5.19 expect
                _pad(
                    offsets,
                    len(ids),
                    (0, 0) if padding_side != "right" or not offsets else (offsets[-1][1],) * 2,
                    padding_side or "left",
                )
                for ids, offsets in zip(result["input_ids"], rows["offset_mapping"], strict=True)
            ]
        if return_text_replacement_offsets:
            result["text_replacement_offsets"] = replacement_offsets
        if return_mm_token_type_ids:
            result["mm_token_type_ids"] = self.create_mm_token_type_ids(result["input_ids"])
        return result

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that stands for one image."""
        grids = [(rows, columns) for row, _, rows, columns in image_inputs["tile_positions"].tolist() if row < 0]
        return self._expansion(*grids[image_idx])

    def _expansion(self, rows: int, columns: int) -> str:
        side = self.image_processor.tokens_per_side
        blocks = ((side, side), self.image_processor.get_token_grid(rows, columns))
        return "".join(f"<im_start>{('<im_patch>' * width + '<im_col>') * height}<im_end>" for height, width in blocks)

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        """Tokens (`num_image_tokens`, structural ones included) and tiles (`num_image_patches`) of images of these
        (height, width), in pixels, without making them. Engines plan with it. `max_tiles`, `min_pixels` and `max_pixels`
        may be given."""
        if image_sizes is None:
            return MultiModalData()
        grids = [self.image_processor.get_tiling(*size, **kwargs)[1] for size in image_sizes]
        return MultiModalData(
            num_image_tokens=[
                sum(
                    2 + height * (width + 1)
                    for height, width in (self._thumbnail_grid, self.image_processor.get_token_grid(*grid))
                )
                for grid in grids
            ],
            num_image_patches=[1 + rows * columns for rows, columns in grids],
        )

    @property
    def _thumbnail_grid(self) -> tuple[int, int]:
        return self.image_processor.get_token_grid(1, 1)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    # ------------------------------------------------------------------------------------------------------------------
    # Chats
    # ------------------------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        tokenize: bool = False,
        sanitize_control_tokens: bool = True,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """
        As [`~ProcessorMixin.apply_chat_template`], with two differences: arguments of the processor (`max_tiles`,
        `padding`, ...) may be given directly, and text in messages stays text unless `sanitize_control_tokens=False`: the
        checkpoint's own special tokens typed into a message are encoded as the characters they are made of. This also works
        together with `return_assistant_tokens_mask=True`. A rendered string cannot carry the distinction: with
        `tokenize=False` they are broken up by a space.

        What it cannot prevent: the template has no tokens that end a user's turn, so that " Assistant:" in a user's
        message reads like the start of an answer.

        Raises:
            TypeError, ValueError: the conversation is not made of messages, content and parts as a template expects them, or
                what is raised by a call.
        """
        processor_kwargs = dict(processor_kwargs or {})
        for name in [name for name in kwargs if name in self._own_kwargs and name not in _TEMPLATE_ARGUMENTS]:
            processor_kwargs[name] = kwargs.pop(name)
        conversation = check_conversation(conversation)
        template = self._template(chat_template)
        tokens = self._control_tokens
        variables = {"control_tokens_in_text": tokenize or not sanitize_control_tokens}
        if not tokenize:
            variables["control_tokens"] = typed_tokens(conversation, tokens)
        # The library takes what a template does not use for ours.
        variables = {name: value for name, value in variables.items() if re.search(rf"\b{name}\b", template)}
        if tokenize and sanitize_control_tokens:
            conversation = mark_chat(conversation, tokens)
            kwargs = {
                # a template may be told what stands for an image
                name: value if name == "image_token" and value == self.image_token else mark(value, tokens)
                for name, value in kwargs.items()
            }
            processor_kwargs["sanitize_control_tokens"] = True
        if tokenize and kwargs.get("return_assistant_tokens_mask"):
            # Each thread has its own: the library keeps the marks of answers in the compiled template while it renders.
            template = template and f"{{{{ '{threading.get_ident()}'[:0] }}}}{template}"
        return super().apply_chat_template(
            conversation,
            chat_template=template or None,
            tokenize=tokenize,
            processor_kwargs=processor_kwargs,
            **{**variables, **kwargs},
        )

    def _template(self, name_or_text: str | None) -> str:
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        return self._self_contained(templates.get(name_or_text or "default") or name_or_text or "")

    def _self_contained(self, template: str) -> str:
        """A release's template with the two variables that it expects and the `<|endoftext|>` that its processor adds: engines
        that render it themselves give it none of these."""
        variables = {
            "image_prompt_token": f"'{self.image_token}'",
            "always_start_with_space": str(self.always_start_with_space).lower(),
        }
        missing = {
            name: value
            for name, value in variables.items()
            if name in template and f"{name} is not defined" not in template
        }
        if not missing:
            return template
        bos, head = self.tokenizer.bos_token, re.split(r"\{%-?\s*for\b", template)[0]
        opening = "" if bos in head or "bos_token" in head else f"{{{{- '{bos}' }}}}"
        defaults = [
            f"{{%- if {name} is not defined %}}{{%- set {name} = {value} %}}{{%- endif %}}"
            for name, value in missing.items()
        ]
        return "".join([*defaults, opening, template])

    @property
    def _own_kwargs(self) -> set[str]:
        groups = self.valid_processor_kwargs.__annotations__
        return {
            *groups,
            *groups["text_kwargs"].__annotations__,
            *groups["images_kwargs"].__annotations__,
            *_ON_REQUEST,
        }

    @property
    def _control_tokens(self) -> tuple[str, ...]:
        return control_tokens(self.tokenizer, STRUCTURAL_TOKENS)

    # ------------------------------------------------------------------------------------------------------------------
    # Loading
    # ------------------------------------------------------------------------------------------------------------------

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # Not by the Auto classes: a released folder names other code in its files, which these would ask to run.
        kwargs.pop("trust_remote_code", None)
        # The image processor's arguments, the tokenizer's and the loader's come together.
        image_processor, _ = JinaVLMImageProcessor.from_pretrained(
            pretrained_model_name_or_path, **{**kwargs, "return_unused_kwargs": True}
        )
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, ValueError, TypeError) as error:
            raise OSError(
                f"No tokenizer could be loaded from {str(pretrained_model_name_or_path)!r}: expected `tokenizer.json` and "
                f"`tokenizer_config.json` there. Take them from the checkpoint that the weights come from. ({error})"
            ) from error
        if "padding_side" not in tokenizer.init_kwargs:
            # for whoever calls the tokenizer by itself, also once it is saved; the release does not say
            tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        return [image_processor, tokenizer]


def _refuse_unknown(kwargs: dict, known: set[str], where: str = "") -> None:
    if unknown := sorted(set(kwargs) - known):
        raise TypeError(
            f"Unknown keyword argument {', '.join(map(repr, unknown))}{where}. Known are: {', '.join(sorted(known))}."
        )


def _pad(values: list, length: int, filler: Any, side: str) -> list:
    padding = [filler] * (length - len(values))
    return padding + values if side == "left" else values + padding


__all__ = ["JinaVLMProcessor"]

put_into_package(__name__)
