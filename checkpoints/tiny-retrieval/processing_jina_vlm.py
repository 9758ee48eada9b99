# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Processor of jina-vlm: text and images become model inputs."""

import inspect
import re
import threading
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs, Unpack

from .arguments_jina_vlm import OF_LOADERS, JinaVLMImageProcessorKwargs, refuse_unknown
from .chat_jina_vlm import check_conversation, check_template_uses, make_self_contained, uses
from .compatibility_jina_vlm import put_into_package
from .control_tokens_jina_vlm import Edit, control_tokens, encode, in_source, mark, mark_chat, typed_tokens
from .conversion_jina_vlm import STRUCTURAL_TOKENS
from .image_loading_jina_vlm import flatten
from .image_processing_jina_vlm import JinaVLMImageProcessor
from .samples_jina_vlm import pad_samples


class JinaVLMTextKwargs(TextKwargs, total=False):  # type: ignore[call-arg]
    sanitize_control_tokens: bool | None  # in the library from 5.24 on


class JinaVLMProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    text_kwargs: JinaVLMTextKwargs
    images_kwargs: JinaVLMImageProcessorKwargs
    # Read by the library before 5.20, which takes what is annotated for a group of arguments.
    _defaults = {}  # type: ignore[misc, var-annotated]


_ON_REQUEST = ("return_mm_token_type_ids", "return_text_replacement_offsets")
# Arguments of tokenizers that they do not keep as attributes
_OF_TOKENIZERS = (
    "additional_special_tokens",
    "chat_control_tokens",
    "fix_mistral_regex",
    "from_slow",
    "gguf_file",
    "legacy",
    "tokenizer_type",
)
# What Python makes of bytes that it cannot decode, and JSON of half an emoji
_SURROGATE = re.compile("[\ud800-\udfff]")
# How tiles are given to trainers
_LAYOUT = ("tiles_by_sample", "return_tile_positions")
# Known to `apply_chat_template` itself
_TEMPLATE_ARGUMENTS = ("return_tensors", "load_audio_from_video")


class JinaVLMProcessor(ProcessorMixin):
    r"""
    Turns text and images into model inputs. Each `<|image|>` in a text stands for one image, and becomes

        <im_start> 14 x (14 x <im_patch> <im_col>) <im_end>   its thumbnail
        <im_start>  R x ( C x <im_patch> <im_col>) <im_end>   its tiles

    with one `<im_patch>` for each image feature of the model. `<|endoftext|>` opens every sequence.

    In [`~JinaVLMProcessor.apply_chat_template`] the text of messages stays text: special tokens of the checkpoint in
    it (`<|image|>`, `<|endoftext|>`, ...) are encoded as ordinary characters. In `text=` they are tokens. Tokens added
    to the tokenizer later (`<box>`) are tokens in both, unless `tokenizer.chat_control_tokens` names them.

    Args:
        image_processor ([`JinaVLMImageProcessor`]): Cuts images into tiles.
        tokenizer (`PreTrainedTokenizerFast`): Must know the structural tokens.
        chat_template (`str`, *optional*): A Jinja template.
        always_start_with_space (`bool`, *optional*, defaults to `True`): Passed to the chat template. The released
            checkpoint's template expects it; this repository's does not use it.
        tiles_by_sample (`bool`, *optional*, defaults to `False`): Give `pixel_values` a row for each text, [texts,
            most tiles, 3, 378, 378], and no `tile_positions`: for trainers that slice, shuffle or repeat rows. A call
            may say otherwise. Not saved: engines need `False`.
        return_tile_positions (`bool`, *optional*, defaults to `True`): If `False`, leave `tile_positions` out, which
            the model then reads off the tokens: for trainers that know `pixel_values` alone. A call may say otherwise.
            Not saved: engines need `True`.

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
        tiles_by_sample: bool = False,
        return_tile_positions: bool = True,
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in STRUCTURAL_TOKENS if token not in vocabulary]:
            raise ValueError(f"The tokenizer lacks {', '.join(missing)}: it does not belong to a jina-vlm checkpoint.")
        self.always_start_with_space = always_start_with_space
        self.tiles_by_sample, self.return_tile_positions = tiles_by_sample, return_tile_positions
        self.auto_map = {"AutoProcessor": "processing_jina_vlm.JinaVLMProcessor"}  # saved, but dropped by loading
        self.image_token = "<|image|>"
        self.image_token_id = vocabulary[self.image_token]
        # `mm_token_type_ids` marks these.
        self.image_token_ids = [vocabulary[t] for t in ("<im_start>", "<im_end>", "<im_patch>", "<im_col>")]
        self.patch_token_id = vocabulary["<im_patch>"]
        if tokenizer.bos_token is None:
            # The release's processor adds `<|endoftext|>`, not its tokenizer, which engines use alone. Here both do.
            # Chats have it from the template, and are to be encoded with `add_special_tokens=False`, as Llama's are.
            tokenizer.bos_token = tokenizer.eos_token
            tokenizer.add_bos_token = True
        super().__init__(image_processor, tokenizer)
        templates: Any = chat_template or tokenizer.chat_template
        if isinstance(templates, dict):
            self.chat_template: Any = {name: self._self_contained(template) for name, template in templates.items()}
        else:
            self.chat_template = templates and self._self_contained(templates)

    # Text and images to model inputs

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[JinaVLMProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: Images, as [`JinaVLMImageProcessor`] takes them: one, a list, or a list for each text.
            text (`str` or `list[str]`, *optional*): Prompts, with one `<|image|>` for each image; one image may do
                without and stands in front. `<|endoftext|>` is put before those that do not begin with it, unless
                `add_special_tokens=False`.
            kwargs: Arguments of the tokenizer (`padding`, `truncation`, `max_length`, ...) and of the image processor
                (`max_tiles`, `min_pixels`, `max_pixels`, ...); `tiles_by_sample`, with which `pixel_values` has a row
                for each text, filled up with tiles of zeros; `return_tile_positions`; `return_tensors`;
                `return_mm_token_type_ids`; `return_text_replacement_offsets`; `sanitize_control_tokens`, with which
                control tokens that `apply_chat_template` marked in `text` become ordinary text. With `return_tensors`
                several texts are padded, by default on the left.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` [texts, length], and with images `pixel_values`
            [tiles, 3, 378, 378] and `tile_positions` [tiles, 4], in the order of the images in the texts. On request
            `mm_token_type_ids` [texts, length], 1 for the tokens of images, and `offset_mapping`, each token's
            characters in the given text, for an image's tokens those of its `<|image|>`. With
            `text_replacement_offsets`, the library's record of each expansion, they are those of the expanded text.

        Raises:
            ValueError, TypeError: the numbers of images and of `<|image|>` differ, a prompt is longer than the model
                takes, truncation would cut an image, a video or an unknown argument was given, or an image is not
                usable.
        """
        media = [kwargs.pop(name, None) for name in ("videos", "audio", "audios")]
        if any(item is not None and not (isinstance(item, list) and not item) for item in media):
            raise ValueError("jina-vlm takes text and images; got a video or audio. Pass a video's frames as images.")
        layout = {name: kwargs.pop(name, None) for name in _LAYOUT}
        tiles_by_sample, return_tile_positions = (
            getattr(self, name) if value is None else value for name, value in layout.items()
        )
        self._check_kwargs(kwargs)
        if text is None and images is None:
            raise ValueError("Expected `text`, `images` or both, got neither.")
        texts = [text] if isinstance(text, str) else list(text) if text is not None else None
        if texts is not None and not all(isinstance(sample, str) for sample in texts):
            raise TypeError(f"`text` must be a string or a list of strings, got {text!r}.")
        if texts == []:
            raise ValueError("Got an empty list of texts.")
        for index, sample in enumerate(texts or ()):
            if broken := _SURROGATE.search(sample):
                raise ValueError(
                    f"Sample {index} has {broken[0]!r} at character {broken.start()}, half of a character, which no "
                    "tokenizer takes. Decode the text as what it was encoded in, or take that out."
                )

        images, placed = self._place_images(images, texts)
        kwargs = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        data, replacements = {}, []
        if images:
            data, replacements = self._process_images(images, **kwargs["images_kwargs"])
        if images and placed and tiles_by_sample:
            counts = [sample.count(self.image_token) for sample in placed]
            pixel_values, positions = (torch.as_tensor(data[name]) for name in ("pixel_values", "tile_positions"))
            data["pixel_values"] = pad_samples(pixel_values, positions, counts)
        if not return_tile_positions or (placed and tiles_by_sample):
            data.pop("tile_positions", None)
        if texts is None:
            return BatchFeature(data, tensor_type=kwargs["images_kwargs"].get("return_tensors"))
        # From 5.20 on the library keeps these two outside the groups.
        on_request = {name: kwargs[name] for name in _ON_REQUEST if name in kwargs}
        text_inputs = self._encode(texts, placed, replacements, **{**kwargs["text_kwargs"], **on_request})
        return BatchFeature(
            {**text_inputs, **data},
            tensor_type=kwargs["text_kwargs"].get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    def _check_kwargs(self, kwargs: dict) -> None:
        """Refuse unknown arguments, which the library would ignore."""
        groups = self.valid_processor_kwargs.__annotations__
        for group in ("text_kwargs", "images_kwargs"):
            refuse_unknown(kwargs.get(group) or {}, {*groups[group].__annotations__, *_ON_REQUEST}, f"in `{group}`")
        refuse_unknown(kwargs, self._own_kwargs | {"common_kwargs"}, f"of {type(self).__name__}")

    def _place_images(self, images: Any, texts: list[str] | None) -> tuple[list, list[str]]:
        """List the images in the order of their places in the texts, and the texts with as many places. As in the
        release, a text without any has its one image in front."""
        if images is None:
            images = []
        elif isinstance(images, (list, tuple)) and not images:
            raise ValueError("Got an empty list of images. Leave `images` out where there are none.")
        nested = isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images)
        images = self.image_processor.fetch_images(images)
        if texts is None:
            return flatten(images), []
        places = [sample.count(self.image_token) for sample in texts]
        if nested and len(images) != len(texts):
            raise ValueError(
                f"Got lists of images for {len(images)} samples, but {len(texts)} texts: {self.image_token} tokens in "
                "the prompts should be the same as the number of images."
            )
        if nested:
            given = [len(flatten(sample)) for sample in images]
        else:
            # Each text takes its images in order while there are any, and the last one all that are left.
            left, given = len(flatten(images)), []
            for place in places if any(places) or left != len(texts) else [1] * left:
                given.append(min(place, left))
                left -= given[-1]
            given[-1] += left
        placed = list(texts)
        for index, (place, number) in enumerate(zip(places, given, strict=True)):
            if (place, number) == (0, 1) and (nested or not any(places)):
                start = self._start(texts[index])
                placed[index] = f"{texts[index][:start]}{self.image_token}{texts[index][start:]}"
            elif place != number:
                raise ValueError(
                    f"Sample {index} has {place} {self.image_token} in its text but {number} images. Write "
                    f"{self.image_token} once for each image, where it belongs."
                )
        return flatten(images), placed

    def _start(self, text: str) -> int:
        """Where a text begins, behind the token that opens sequences."""
        return len(bos) if text.startswith(bos := self.tokenizer.bos_token or self.tokenizer.eos_token) else 0

    def _encode(
        self,
        texts: list[str],
        placed: list[str],
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
        """Encode and pad texts, given and with places for images. Nothing is set on the tokenizer, which other threads
        may be using."""
        if given := sorted(name for name, value in unsupported.items() if value):
            raise TypeError(
                f"{', '.join(given)}: not supported with images. Call `processor.tokenizer` for text alone."
            )
        limit = self.tokenizer.model_max_length if max_length is None else max_length
        if limit < 1:
            raise ValueError(f"`max_length` must be at least 1, got {max_length}.")
        bos = self.tokenizer.bos_token or self.tokenizer.eos_token
        expanded, replacement_offsets = self.get_text_with_replacements(list(placed), replacements)
        if sum(map(len, replacement_offsets)) != len(replacements):
            raise ValueError(
                f"A {self.image_token} stands behind U+F0000, by which the library marks typed ones. Take that "
                "character out."
            )
        encodings = encode(self.tokenizer, expanded, self._control_tokens if sanitize_control_tokens else None)
        all_ids, all_offsets = [], []
        for index, (ids, offsets) in enumerate(encodings):
            if replacement_offsets and not return_text_replacement_offsets:
                edits = [Edit(item["new_span"], item["span"]) for item in replacement_offsets[index]]
                offsets = [in_source(offset, edits) for offset in offsets]
                if placed[index] != texts[index]:
                    start = self._start(texts[index])
                    front = Edit((start, start + len(self.image_token)), (start, start))
                    offsets = [in_source(offset, [front]) for offset in offsets]
            if add_special_tokens in (None, True) and not texts[index].startswith(bos):
                ids, offsets = [self.tokenizer.convert_tokens_to_ids(bos), *ids], [(0, 0), *offsets]
            if truncation and truncation != "do_not_truncate" and len(ids) > limit:
                kept = slice(limit) if self.tokenizer.truncation_side == "right" else slice(-limit, None)
                if ids[kept].count(self.patch_token_id) != ids.count(self.patch_token_id):
                    raise ValueError(
                        f"Sample {index} has {len(ids)} tokens; truncation to {limit} would cut an image. Raise "
                        "`max_length`, or take fewer or smaller images (`max_tiles`)."
                    )
                ids, offsets = ids[kept], offsets[kept]
            if len(ids) > self.tokenizer.model_max_length:
                raise ValueError(
                    f"Sample {index} has {len(ids)} tokens, the model takes {self.tokenizer.model_max_length}. "
                    "Shorten the text, or take fewer or smaller images (`max_tiles`)."
                )
            all_ids.append(ids)
            all_offsets.append(offsets)

        if padding is None:
            padding = return_tensors is not None and len(texts) > 1
        padding_side = padding_side or "left"
        padded = self.tokenizer.pad(
            {"input_ids": all_ids},
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            verbose=False,
        )
        result = dict(padded)
        if return_offsets_mapping:
            result["offset_mapping"] = []
            for ids, offsets in zip(result["input_ids"], all_offsets, strict=True):
                # Empty spans, so placed that all stay in order
                end = offsets[-1][1] if offsets and padding_side == "right" else 0
                filler = [(end, end)] * (len(ids) - len(offsets))
                result["offset_mapping"].append(offsets + filler if padding_side == "right" else filler + offsets)
        if return_text_replacement_offsets:
            result["text_replacement_offsets"] = replacement_offsets
        if return_mm_token_type_ids:
            result["mm_token_type_ids"] = self.create_mm_token_type_ids(result["input_ids"])
        return result

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Write the text that stands for one image."""
        grids = [(rows, columns) for row, _, rows, columns in image_inputs["tile_positions"].tolist() if row < 0]
        return self._expansion(*grids[image_idx])

    def _expansion(self, rows: int, columns: int) -> str:
        return "".join(
            f"<im_start>{('<im_patch>' * width + '<im_col>') * height}<im_end>"
            for height, width in self._get_token_grids(rows, columns)
        )

    def _get_token_grids(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Compute (rows, columns) of the tokens of an image's thumbnail and of its tiles."""
        return [self.image_processor.get_token_grid(*grid) for grid in ((1, 1), (rows, columns))]

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        """Count tokens (`num_image_tokens`, structural ones too) and tiles (`num_image_patches`) of images of these
        (height, width), in pixels. Engines plan by it. Takes the image processor's arguments."""
        if image_sizes is None:
            return MultiModalData()
        grids = [self.image_processor.get_tiling(*size, **kwargs)[1] for size in image_sizes]
        return MultiModalData(
            num_image_tokens=[
                sum(2 + height * (width + 1) for height, width in self._get_token_grids(*grid)) for grid in grids
            ],
            num_image_patches=[1 + rows * columns for rows, columns in grids],
        )

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    # Chats

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        tokenize: bool = False,
        sanitize_control_tokens: bool = True,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Render a chat as [`~ProcessorMixin.apply_chat_template`] does. Two things differ: arguments of the processor
        (`max_tiles`, `padding`, ...) may be given directly, and special tokens of the checkpoint typed into a message
        become ordinary text unless `sanitize_control_tokens=False`; with `tokenize=False` a space breaks them up.

        No token ends a user's turn in the template: " Assistant:" in a message reads like the start of an answer.

        Raises:
            TypeError, ValueError: the conversation is not made of messages, content and parts as a template expects
                them; the template has no place for `tools` or `documents`; or as from a call.
        """
        processor_kwargs = dict(processor_kwargs or {})
        for name in [name for name in kwargs if name in self._own_kwargs and name not in _TEMPLATE_ARGUMENTS]:
            processor_kwargs[name] = kwargs.pop(name)
        conversation = check_conversation(conversation)
        template = self._template(chat_template)
        check_template_uses(template, conversation, kwargs)
        tokens = self._control_tokens
        variables: dict[str, Any] = {"control_tokens_in_text": tokenize or not sanitize_control_tokens}
        if not tokenize:
            variables["control_tokens"] = typed_tokens(conversation, tokens)
        # The library would pass a variable that the template does not use to our call.
        variables = {name: value for name, value in variables.items() if uses(template, name)}
        if tokenize and sanitize_control_tokens:
            conversation = mark_chat(conversation, tokens)
            kwargs = {
                # A template may be told what stands for an image.
                name: value if name == "image_token" and value == self.image_token else mark(value, tokens)
                for name, value in kwargs.items()
            }
            processor_kwargs["sanitize_control_tokens"] = True
        if tokenize and kwargs.get("return_assistant_tokens_mask"):
            # One template for each thread: the library keeps the spans of answers in it while it renders.
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
        return make_self_contained(template, self.image_token, self.tokenizer.bos_token, self.always_start_with_space)

    @property
    def _own_kwargs(self) -> set[str]:
        groups = self.valid_processor_kwargs.__annotations__
        named = (*groups["text_kwargs"].__annotations__, *groups["images_kwargs"].__annotations__)
        return {*groups, *named, *_ON_REQUEST, *_LAYOUT}

    @property
    def _control_tokens(self) -> tuple[str, ...]:
        return control_tokens(self.tokenizer, STRUCTURAL_TOKENS)

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """List the settings as [`~ProcessorMixin.to_dict`] does, without what trainers alone want."""
        return {name: value for name, value in super().to_dict(*args, **kwargs).items() if name not in _LAYOUT}

    # Loading

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # Auto classes would ask to run the code that a released folder names.
        kwargs.pop("trust_remote_code", None)
        image_processor, others = JinaVLMImageProcessor.from_pretrained(
            pretrained_model_name_or_path, **{**kwargs, "return_unused_kwargs": True}
        )
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, ValueError, TypeError) as error:
            raise OSError(
                f"No tokenizer could be loaded from {str(pretrained_model_name_or_path)!r}: expected `tokenizer.json` "
                "and `tokenizer_config.json` there. Take them from the checkpoint that the weights come from. "
                f"({error})"
            ) from error
        # The tokenizer keeps whatever it is given, and nobody would read it.
        asked_for = {
            name: value
            for name, value in others.items()
            if name not in (*OF_LOADERS, *_OF_TOKENIZERS) and name[0] != "_" and not hasattr(tokenizer, name)
        }
        known = {*inspect.signature(cls.__init__).parameters, *JinaVLMImageProcessor.valid_kwargs.__annotations__}
        refuse_unknown(asked_for, known - {"self"}, f"of {cls.__name__}, nor of its tokenizer")
        if "padding_side" not in tokenizer.init_kwargs:
            # For those who call the tokenizer alone, also once it is saved
            tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        return [image_processor, tokenizer]


__all__ = ["JinaVLMProcessor"]

put_into_package(__name__)
