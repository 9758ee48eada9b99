"""Vectors of texts and images: cut, quantized, compared, written to a file and read again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn import functional as F

from jina_vlm_tools.files import write_whole

from .scores import cut, max_sim


Precision = Literal["float32", "int8", "binary"]
PRECISIONS = ("float32", "int8", "binary")
LAYOUT = "jina-vlm embeddings 1"


@dataclass(frozen=True)
class Embeddings:
    """
    Args:
        dense (`torch.Tensor` [n, d], *optional*): A vector of each input.
        multi (`list[torch.Tensor]`, *optional*): Of each input [tokens, width], a vector of each token.
        precision (`str`): "float32", of length 1; "int8", which only have a direction; or "binary", the signs of
            eight numbers in each byte.
    """

    dense: torch.Tensor | None = None
    multi: list[torch.Tensor] | None = None
    precision: Precision = "float32"

    def __len__(self) -> int:
        return len(self.multi if self.dense is None else self.dense)

    def __getitem__(self, which: slice | int | Sequence[int]) -> Embeddings:
        """Some of them, in the order asked for."""
        if isinstance(which, slice):
            numbers = list(range(len(self))[which])
        else:
            numbers = [which] if isinstance(which, int) else [int(number) for number in which]
        dense = None if self.dense is None else self.dense[numbers]
        multi = None if self.multi is None else [self.multi[number] for number in numbers]
        return dataclasses.replace(self, dense=dense, multi=multi)

    def truncate(self, dims: int) -> Embeddings:
        """Keep the first `dims` numbers of dense vectors (Matryoshka, arXiv 2205.13147). Multi-vectors stay.

        Raises:
            ValueError: there are no dense vectors, they are shorter, or they are quantized.
        """
        if self.dense is None or self.precision != "float32":
            raise ValueError(f"Only dense float32 vectors can be cut; these are {self._said}. Cut before `quantize`.")
        if not 1 <= dims <= self.dense.shape[1]:
            raise ValueError(f"`dims` must be from 1 to {self.dense.shape[1]}, got {dims}.")
        return dataclasses.replace(self, dense=cut(self.dense, dims))

    def quantize(self, precision: Precision) -> Embeddings:
        """Make the vectors a fourth as large ("int8") or a thirty-second ("binary").

        Raises:
            ValueError: the precision is none of these, the vectors are quantized already, or "binary" is asked of
                vectors whose width is no multiple of 8.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
        if precision == "float32":
            return self.restore()
        if self.precision != "float32":
            raise ValueError(f"These vectors are {self._said} already: quantize the float32 ones.")
        pack = _to_int8 if precision == "int8" else _to_signs
        dense = None if self.dense is None else pack(self.dense)
        multi = None if self.multi is None else [pack(one) for one in self.multi]
        return Embeddings(dense, multi, precision)

    def restore(self) -> Embeddings:
        """Float32 vectors of length 1 that have what is left of the directions."""
        if self.precision == "float32":
            return self
        unpack = torch.Tensor.float if self.precision == "int8" else _from_signs
        dense = None if self.dense is None else F.normalize(unpack(self.dense), dim=-1)
        multi = None if self.multi is None else [F.normalize(unpack(one), dim=-1) for one in self.multi]
        return Embeddings(dense, multi)

    def score(self, documents: Embeddings) -> torch.Tensor:
        """Compare these, as queries, with documents: by late interaction where both have multi-vectors, else by the
        cosine of their dense vectors.

        Returns:
            `torch.Tensor` [queries, documents] float32. Late interaction sums, over a query's tokens, the cosine with
            the best of a document's (ColBERT, arXiv 2004.12832).

        Raises:
            ValueError: the two have no kind of vectors in common, or these have different widths.
        """
        queries, documents = self.restore(), documents.restore()
        if queries.multi is not None and documents.multi is not None:
            _check_widths(*(one.multi[0].shape[1] for one in (queries, documents) if one.multi))
            lengths = [len(one) for one in queries.multi]
            offsets = torch.tensor([0, *(len(one) for one in documents.multi)]).cumsum(0)
            if not lengths or not documents.multi:
                return torch.zeros(len(queries), len(documents))
            tokens = torch.cat(documents.multi)
            return torch.stack([len(one) * max_sim(one, tokens, offsets) for one in queries.multi])
        if queries.dense is None or documents.dense is None:
            raise ValueError(f"Queries are {queries._said}, documents {documents._said}: embed both as the same kind.")
        _check_widths(queries.dense.shape[1], documents.dense.shape[1])
        return queries.dense @ documents.dense.T

    def save(self, file: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {} if self.dense is None else {"dense": self.dense.contiguous()}
        if self.multi is not None:
            tensors["multi"] = torch.cat(self.multi) if self.multi else torch.zeros(0, 0)
            tensors["lengths"] = torch.tensor([len(one) for one in self.multi], dtype=torch.int64)
        about = {"layout": LAYOUT, "precision": self.precision}
        write_whole(Path(file), save(tensors, {"jina_vlm": json.dumps(about)}))

    @classmethod
    def load(cls, file: str | Path) -> Embeddings:
        """
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it was not written by [`Embeddings.save`], or is damaged.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file}: no such file.")
        try:
            with safe_open(file, "pt") as opened:
                about = json.loads((opened.metadata() or {}).get("jina_vlm", "{}"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no dictionary
            if about.get("layout") != LAYOUT:
                raise ValueError("it holds other tensors than embeddings, which `Embeddings.save` writes.")
            if about.get("precision") not in PRECISIONS:
                raise ValueError(f"its precision is {about.get('precision')!r}.")
            multi = list(tensors["multi"].split(tensors["lengths"].tolist())) if "lengths" in tensors else None
        except (SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no file of embeddings, or a damaged one: {error}") from error
        return cls(tensors.get("dense"), multi, about["precision"])

    @property
    def _said(self) -> str:
        kinds = [name for name, there in (("dense", self.dense), ("multi-vectors", self.multi)) if there is not None]
        return f"{' and '.join(kinds)} ({self.precision})"


def join(parts: Sequence[Embeddings]) -> Embeddings:
    """One after the other, in the order given. All are of one kind and precision.

    Raises:
        ValueError: there are none, or they differ in kind.
    """
    if len({part._said for part in parts}) != 1:
        raise ValueError(f"Expected embeddings of one kind, got {', '.join(part._said for part in parts) or 'none'}.")
    dense = None if parts[0].dense is None else torch.cat([part.dense for part in parts])
    multi = None if parts[0].multi is None else [one for part in parts for one in part.multi]
    return Embeddings(dense, multi, parts[0].precision)


def _check_widths(queries: int, documents: int) -> None:
    if queries != documents:
        raise ValueError(f"Queries have vectors of {queries} numbers, documents of {documents}: cut both alike.")


def _to_int8(vectors: torch.Tensor) -> torch.Tensor:
    """Each vector by its own largest number: only directions are compared."""
    largest = vectors.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (127 * vectors / largest).round().to(torch.int8)


BITS = 2 ** torch.arange(7, -1, -1, dtype=torch.int64)


def _to_signs(vectors: torch.Tensor) -> torch.Tensor:
    if vectors.shape[-1] % 8:
        raise ValueError(f"Binary vectors take multiples of 8 numbers, these have {vectors.shape[-1]}.")
    return ((vectors > 0).unflatten(-1, (-1, 8)) * BITS).sum(-1).to(torch.uint8)


def _from_signs(packed: torch.Tensor) -> torch.Tensor:
    signs = (packed[..., None].to(torch.int64) & BITS) > 0
    return signs.flatten(-2).float() * 2 - 1
