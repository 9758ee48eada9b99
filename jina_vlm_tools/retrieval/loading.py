"""Embedders, from what people name them by."""

import warnings
from pathlib import Path

from jina_vlm_tools.inference.loading import choose_device, default_dtype

from .embedder import JinaVLMEmbedder
from .folder import is_retrieval_folder, read_folder


def load_embedder(name: str, device: str | None = None, dtype: str | None = None) -> JinaVLMEmbedder:
    """
    An embedder on a device, which answers as well.

    Args:
        name: A retrieval folder, a checkpoint, or a repository of the Hub with either.
        device: Such as "cuda:1"; a GPU, if there is one, where it is left out.
        dtype: [`default_dtype`] of the base, where it is left out.

    Raises:
        OSError, ValueError: it is not there, or cannot be loaded; the message says why.
    """
    device = choose_device(device)
    try:
        found = read_folder(name) if is_retrieval_folder(name) else None
        dtype = dtype or default_dtype(found.base if found else name, device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what the library renames
            return JinaVLMEmbedder.from_pretrained(found or name, dtype=dtype, device_map={"": device})
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"--model {name} cannot be loaded: {error}") from error


def full_name(name: str) -> str:
    """As an index keeps it: a folder's whole path."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name
