"""Engines beside torch, and which of them a checkpoint is for. Imports nothing that takes time."""

import json
from pathlib import Path


TORCH, LLAMA_CPP = ENGINES = ("torch", "llama.cpp")
LLAMA_CPP_MODEL_TYPE = "jina_vlm_llama_cpp"  # in a checkpoint's config.json


def find_engine(checkpoint: str | Path) -> str:
    """Tell which engine a checkpoint is for. A repository of the Hub, or a folder that says nothing, is for torch."""
    try:
        config = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return TORCH
    is_converted = isinstance(config, dict) and config.get("model_type") == LLAMA_CPP_MODEL_TYPE
    return LLAMA_CPP if is_converted else TORCH


def check_engine(checkpoint: str, engine: str | None) -> str:
    """
    Settle which engine runs a checkpoint.

    Args:
        engine: What was asked for; None for the one that the checkpoint is for.

    Returns:
        One of `ENGINES`.

    Raises:
        ValueError: it is for the other one; the message says how to make one that fits.
    """
    found = find_engine(checkpoint)
    if engine in (None, found):
        return found
    if engine == LLAMA_CPP:
        raise ValueError(
            f"{checkpoint} is for torch. For llama.cpp convert it first, and name the folder that this makes: "
            f"jina-vlm convert {checkpoint} FOLDER --to gguf --quantize Q4_K_M"
        )
    raise ValueError(
        f"{checkpoint} was converted for llama.cpp, and holds no text model for {engine}. Name the checkpoint that "
        "it was converted from, or leave --engine out."
    )
