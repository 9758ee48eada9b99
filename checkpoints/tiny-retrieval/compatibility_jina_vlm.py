# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""What depends on the version of transformers: the oldest supported one, and what the newest or older ones need.

Everything else in the bundle follows the newest version's names. Each part below says when it can go.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from transformers import __version__


OLDEST = (5, 19)  # what the newest vLLM for CPUs, 0.32, runs on
VERSION = tuple(int(part) for part in re.findall(r"\d+", __version__)[:2])
if VERSION < OLDEST:
    raise ImportError(
        f"jina-vlm needs transformers {'.'.join(map(str, OLDEST))} or newer, found {__version__}. "
        "Run `pip install -U transformers`."
    )

from transformers import Cache  # noqa: E402  # behind the check of the version


# The cache's name among arguments and outputs of the library's models. Goes when 5.24 is the oldest version.
CACHE_NAME = "cache" if VERSION >= (5, 24) else "past_key_values"


def cache_argument(cache: Any) -> dict[str, Any]:
    """Name a cache as the library's models take it. Goes when 5.24 is the oldest version: before it, `cache` was what
    continuous batching hands through to attention."""
    is_paged = cache is not None and not isinstance(cache, Cache)
    return {"cache" if is_paged else CACHE_NAME: cache}


# The prefix in `..._enable` and `..._kwargs`. Goes when 5.23 is the oldest version.
CHECKPOINTING = "activation_checkpointing" if VERSION >= (5, 23) else "gradient_checkpointing"


def accepts_past_key_values(forward: Callable) -> Callable:
    """Let callers of `forward(cache=...)` use the argument's older name as well. Goes with 5.40, as in the library."""
    if VERSION >= (5, 24):
        from transformers.utils.deprecation import deprecate_kwarg

        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)(forward)

    @functools.wraps(forward)
    def renamed(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            if kwargs.get("cache") is not None:
                raise ValueError("Got both `cache` and `past_key_values`, which are one argument. Pass one of them.")
            kwargs["cache"] = past_key_values
        return forward(*args, **kwargs)

    # PEFT looks here for the name.
    signature = inspect.signature(forward)
    renamed.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            parameter.replace(name="past_key_values") if name == "cache" else parameter
            for name, parameter in signature.parameters.items()
        ]
    )
    return renamed


# Before 5.23 `prefill_chunk_size` gave each chunk all images. Goes when 5.23 is the oldest version.
CHUNKS_CAN_HAVE_IMAGES = VERSION >= (5, 23)


def put_into_package(name: str) -> None:
    """Make a module an attribute of its package, as `import` does, but not the library's loader of remote code.

    dill, by which `datasets` sends functions to other processes, looks for classes there. Those it does not find it
    sends as code, of which it cannot rebuild typed dictionaries. Goes once the loader does this (5.24 does not).
    """
    package, _, short_name = name.rpartition(".")
    setattr(sys.modules[package], short_name, sys.modules[name])
