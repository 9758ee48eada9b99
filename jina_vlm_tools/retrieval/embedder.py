"""Embeds texts and images with the weights that answer, too: `JinaVLMEmbedder`."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from torch import nn
from torch.nn import functional as F

from .embeddings import Embeddings, join
from .folder import RetrievalFolder, is_retrieval_folder, read_folder
from .heat_maps import HeatMap, match
from .inputs import Role, check, prepare
from .scores import cut, pool
from .token_pooling import pool_tokens


if TYPE_CHECKING:
    from peft import PeftModel


Kind = Literal["dense", "multi", "both"]
KINDS = ("dense", "multi", "both")
WINDOW = 4  # batches that are sorted by length together


class JinaVLMEmbedder:
    """
    Makes vectors of texts, images, and both together, to find one by another; and answers from what was found, with
    the same weights.

    An adapter is switched on while something is embedded, and off otherwise: the model generates as before. Calls from
    several threads take turns.

    Args:
        model ([`JinaVLMForConditionalGeneration`]): Which may be used elsewhere at the same time, but while it embeds.
        processor ([`JinaVLMProcessor`]): Its own.
        projector (`nn.Linear`, *optional*): From the model's width to that of multi-vectors.
        adapters (`dict[str, str]`, *optional*): Folders or repositories of PEFT adapters, by the task that they are
            for, such as "retrieval" or "text-matching". Without any, the model embeds as it is.
    """

    def __init__(
        self,
        model: JinaVLMForConditionalGeneration,
        processor: JinaVLMProcessor,
        projector: nn.Linear | None = None,
        adapters: dict[str, str] | None = None,
    ):
        hidden = model.config.get_text_config().hidden_size
        if projector is not None and projector.in_features != hidden:
            raise ValueError(
                f"The projector takes vectors of {projector.in_features} numbers, but the model makes {hidden}: they "
                "do not belong together."
            )
        self.model, self.processor = model, processor
        self.projector = None if projector is None else projector.to(model.device, torch.float32).eval()
        self.tasks = list(adapters or {})
        self.task: str | None = self.tasks[0] if self.tasks else None
        self._lock = threading.RLock()
        self._on: str | None = None  # the task whose adapter is switched on
        # PEFT's own calls: the library's wrap them, and may ask for a newer PEFT than there is.
        self._adapted: PeftModel | None = None
        for task, place in (adapters or {}).items():
            from peft import PeftModel

            if self._adapted is None:
                self._adapted = PeftModel.from_pretrained(model, place, adapter_name=task)
            else:
                self._adapted.load_adapter(place, adapter_name=task)
        if self._adapted is not None:
            self._adapted.base_model.disable_adapter_layers()
        model.eval()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | RetrievalFolder,
        *,
        adapters: dict[str, str] | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> JinaVLMEmbedder:
        """
        Load a retrieval folder, an adapter and a projector beside the base that they belong to; or a checkpoint as it
        is.

        Args:
            model: A folder, or a repository of the Hub, or what [`read_folder`] found there. The base of an adapter
                is looked for in the folder beside it that has its name, then by that name.
            adapters: More adapters of the same base, by task.
            dtype, device_map: Of the base, as `from_pretrained` takes them.
            revision, local_files_only: Of `model`.

        Raises:
            OSError, ValueError: something is not there, or does not belong together; the message says what.
        """
        hub = {"revision": revision, "local_files_only": local_files_only}
        if not isinstance(model, RetrievalFolder) and is_retrieval_folder(model, **hub):
            model = read_folder(model, **hub)
        projector, adapters, base = None, dict(adapters or {}), str(model)
        if isinstance(model, RetrievalFolder):
            base, projector, hub["revision"] = model.base, model.projector, None
            adapters = {model.task: model.path} | adapters
            processor = model.load_processor()
        else:
            processor = JinaVLMProcessor.from_pretrained(base, **hub)
        loaded = JinaVLMForConditionalGeneration.from_pretrained(base, dtype=dtype, device_map=device_map, **hub)
        return cls(loaded, processor, projector, adapters)

    # Embedding

    def embed(
        self,
        inputs: Sequence[Any],
        *,
        task: str | None = None,
        role: Role = "document",
        kind: Kind = "dense",
        dims: int | None = None,
        batch_size: int = 8,
        max_tiles: int | None = None,
        max_pixels: int | None = None,
        max_length: int | None = None,
        pool_factor: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Embeddings:
        """
        Args:
            inputs: Each a text, a PIL image, a `pathlib.Path` of an image, or {"text": ..., "image": ...} with an
                image, its path or URL, or a list of these.
            task (`str`, *optional*): One of `tasks`; the property `task` where it is left out.
            role (`str`): "query" for what is looked for, "document" for what is looked through.
            kind (`str`): "dense", a vector of each input; "multi", of each token; "both", in one pass.
            dims (`int`, *optional*): Of dense vectors, one of the model's `matryoshka_dimensions`.
            max_tiles, max_pixels (`int`, *optional*): As the image processor takes them.
            max_length (`int`, *optional*): Tokens, to which longer texts are cut; the model's longest where it is left
                out or more than that, with a warning. Images are never cut.
            pool_factor (`int`): How many tokens of a document become one multi-vector, those that are most alike.
            progress: Called with the numbers of inputs that are done, and of all.

        Returns:
            [`Embeddings`], float32 on the CPU, in the order of the inputs, each vector of length 1.

        Raises:
            ValueError, TypeError, OSError: an input or an argument cannot be used; the message says which and why.
        """
        if isinstance(inputs, (str, dict)) or not isinstance(inputs, Sequence):
            raise TypeError(f"Expected a list of inputs, got {type(inputs).__name__}. Put a single one into a list.")
        self._check_arguments(kind, dims, batch_size, pool_factor)
        contents = [check(content, index) for index, content in enumerate(inputs)]
        images = {"max_tiles": max_tiles, "max_pixels": max_pixels}
        settings = {name: value for name, value in images.items() if value is not None}
        limit = self.processor.tokenizer.model_max_length
        if max_length is not None and max_length > limit:
            max_length = None  # it is the model's that cuts
        settings |= {"truncation": True, "max_length": limit if max_length is None else max_length}
        factor = pool_factor if role == "document" else 1
        done: list[Embeddings] = []
        with self.using(task):
            for start in range(0, len(contents), WINDOW * batch_size):
                window = range(start, min(start + WINDOW * batch_size, len(contents)))
                # Like with like: a batch is as long as its longest.
                order = sorted(window, key=lambda index: (len(contents[index]["image"]), len(contents[index]["text"])))
                parts = []
                for first in range(0, len(order), batch_size):
                    batch = order[first : first + batch_size]
                    prepared = self._prepare([contents[index] for index in batch], batch, role, settings, max_length)
                    parts.append(self._embed_batch(prepared, kind, dims, factor))
                    if progress:
                        progress(start + min(first + batch_size, len(order)), len(contents))
                places = {index: place for place, index in enumerate(order)}
                done.append(join(parts)[[places[index] for index in window]])
        return join(done) if done else self._nothing(kind, dims)

    def _check_arguments(self, kind: Kind, dims: int | None, batch_size: int, pool_factor: int) -> None:
        if kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
        if kind != "dense" and self.projector is None:
            raise ValueError(
                "Multi-vectors need a projector, which this checkpoint does not bring. Load a folder that has one "
                "(`1_Dense`), or ask for kind='dense'."
            )
        config = self.model.config
        allowed = config.matryoshka_dimensions
        if dims is not None and (kind == "multi" or dims not in allowed):
            listed = ", ".join(map(str, allowed))
            raise ValueError(f"`dims` is for dense vectors, and one of {listed}; got {dims!r} with kind={kind!r}.")
        for name, value in (("batch_size", batch_size), ("pool_factor", pool_factor)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if pool_factor > 1 and kind == "dense":
            raise ValueError("`pool_factor` is for multi-vectors, got kind='dense'.")

    def _prepare(self, contents: list, numbers: list[int], role: Role, settings: dict, asked: int | None) -> dict:
        try:
            inputs = dict(prepare(self.processor, contents, role, **settings))
        except (ValueError, TypeError, OSError) as error:
            if len(contents) == 1:
                raise type(error)(f"Input {numbers[0]}: {error}") from error
            for content, number in zip(contents, numbers, strict=True):
                self._prepare([content], [number], role, settings, asked)  # says which
            raise
        longest = inputs["attention_mask"].sum(1)
        if asked is None and (longest == settings["max_length"]).any():
            which = [number for number, length in zip(numbers, longest.tolist(), strict=True)
                     if length == settings["max_length"]]  # fmt: skip
            warnings.warn(
                f"Inputs {', '.join(map(str, which))} are as long as the model takes, {settings['max_length']} "
                f"tokens, or were cut to that. Pass `max_length={settings['max_length']}` to have it so without this "
                "warning.",
                stacklevel=4,
            )
        return inputs

    @torch.inference_mode()
    def _embed_batch(self, inputs: dict, kind: Kind, dims: int | None, factor: int) -> Embeddings:
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        states = self.model.model(**inputs, use_cache=False).last_hidden_state
        mask = inputs["attention_mask"]
        dense = multi = None
        if kind != "multi":
            dense = cut(pool(states, mask), dims).cpu()
        if kind != "dense":
            tokens = F.normalize(self.projector(states.float()), dim=-1).cpu()
            multi = [pool_tokens(one[kept], factor) for one, kept in zip(tokens, mask.bool().cpu(), strict=True)]
        return Embeddings(dense, multi)

    def _nothing(self, kind: Kind, dims: int | None) -> Embeddings:
        width = dims or self.model.config.get_text_config().hidden_size
        return Embeddings(None if kind == "multi" else torch.zeros(0, width), None if kind == "dense" else [])

    @contextmanager
    def using(self, task: str | None = None) -> Iterator[None]:
        """Switch a task's adapter on, and at the end back to what was, whatever happens.

        Raises:
            ValueError: there is no adapter for it.
        """
        task = task or self.task
        if task is not None and task not in self.tasks:
            loaded = f"Adapters are loaded for {', '.join(self.tasks)}." if self.tasks else "No adapter is loaded."
            raise ValueError(f"There is no adapter for `task` {task!r}. {loaded}")
        with self._switched(task):
            yield

    @contextmanager
    def _switched(self, task: str | None) -> Iterator[None]:
        """`task`: whose adapter is on meanwhile; None for none."""
        with self._lock:
            before = self._on
            try:
                self._switch(task)
                yield
            finally:
                self._switch(before)

    def _switch(self, task: str | None) -> None:
        if task is not None:
            self._adapted.set_adapter(task, inference_mode=True)
            self._adapted.base_model.enable_adapter_layers()
        elif self.tasks:
            self._adapted.base_model.disable_adapter_layers()
        self._on = task

    # Comparing, showing, answering

    @staticmethod
    def score(queries: Embeddings, documents: Embeddings) -> torch.Tensor:
        """[queries, documents]: see [`Embeddings.score`]."""
        return queries.score(documents)

    def heat_map(self, query: str, image: Any, *, task: str | None = None, max_tiles: int | None = None) -> HeatMap:
        """
        Find where on an image each word of a query has its best matches.

        Raises:
            ValueError: there is no projector; or as from `embed`.
        """
        self._check_arguments("multi", None, 1, 1)
        return match(self, query, image, task, max_tiles)

    @cached_property
    def answering_processor(self) -> JinaVLMProcessor:
        """The base's: an adapter's own cuts into as many tiles as it was trained with, and small print takes more."""
        return JinaVLMProcessor.from_pretrained(self.model.name_or_path) if self.tasks else self.processor

    def answer(self, question: str, images: Any | Sequence[Any], *, max_tiles: int | None = None, **generate) -> str:
        """
        Answer a question about images, as the model without adapters does.

        Args:
            images: One, or a list of them.
            max_tiles (`int`, *optional*): Of an image; as many as the base takes where it is left out.
            generate: Arguments of `generate`; at most 256 tokens, greedy, unless they say otherwise.
        """
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        parts = [{"type": "image", "image": str(one) if isinstance(one, Path) else one} for one in images]
        settings = {} if max_tiles is None else {"max_tiles": max_tiles}
        processor = self.answering_processor
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **settings,
        ).to(self.model.device)  # fmt: skip
        with self._switched(None):
            output = self.model.generate(**inputs, **{"max_new_tokens": 256, "do_sample": False, **generate})
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    # As jina-embeddings-v4 has them

    def encode_text(
        self,
        texts: str | Sequence[str],
        task: str | None = None,
        max_length: int = 32768,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        prompt_name: str | None = None,
    ) -> Any:
        """
        Embed texts, with the arguments of jina-embeddings-v4's method of this name.

        Args:
            prompt_name (`str`, *optional*): "query" or "passage"; without one, "query", as there.

        Returns:
            A tensor for a single text, else a list of them; of numpy arrays with `return_numpy`, stacked where all
            have one shape.
        """
        if prompt_name not in (None, "query", "passage"):
            raise ValueError(f'`prompt_name` must be "query" or "passage", got {prompt_name!r}.')
        role: Role = "document" if prompt_name == "passage" else "query"
        asked = {"task": task, "role": role, "dims": truncate_dim, "batch_size": batch_size, "max_length": max_length}
        return self._encode(texts, return_multivector, return_numpy, asked, str)

    def encode_image(
        self,
        images: Any,
        task: str | None = None,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
    ) -> Any:
        """
        Embed images, as PIL images, paths or URLs, with the arguments of jina-embeddings-v4's method of this name.

        Returns:
            As [`encode_text`].
        """
        asked = {"task": task, "role": "document", "dims": truncate_dim, "batch_size": batch_size}
        if max_pixels is not None:
            asked["max_pixels"] = max_pixels
        return self._encode(images, return_multivector, return_numpy, asked, lambda image: {"image": image})

    def _encode(self, inputs: Any, multi: bool, return_numpy: bool, asked: dict, to_input: Callable) -> Any:
        is_list = isinstance(inputs, (list, tuple))
        if multi and asked["dims"] is not None:
            raise ValueError("`truncate_dim` is for dense vectors, got it with `return_multivector`.")
        embedded = self.embed(
            [to_input(one) for one in (inputs if is_list else [inputs])], kind="multi" if multi else "dense", **asked
        )
        vectors = embedded.multi if multi else list(embedded.dense)
        if return_numpy:
            arrays = [vector.numpy() for vector in vectors]
            if not is_list:
                return arrays[0]
            return np.stack(arrays) if arrays and len({array.shape for array in arrays}) == 1 else arrays
        return vectors if is_list else vectors[0]
