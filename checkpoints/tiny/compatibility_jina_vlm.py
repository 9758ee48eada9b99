# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""What jina-vlm needs of the library's versions: the oldest that is supported, what other versions than the newest need, and
what the newest still leaves undone.

Everything else in the bundle follows the newest version's names. Each part below says when it can go.
"""

import functools
import inspect
import re
import sys

from transformers import __version__


OLDEST = (5, 19)  # what the newest vLLM for CPUs, 0.32, runs on
VERSION = tuple(int(part) for part in re.findall(r"\d+", __version__)[:2])
if VERSION < OLDEST:
    raise ImportError(
        f"jina-vlm needs transformers {'.'.join(map(str, OLDEST))} or newer, found {__version__}. "
        "Run `pip install -U transformers`."
    )

# Goes when 5.24 is the oldest version. The name of the cache among arguments and outputs of the library's own models.
CACHE_NAME = "cache" if VERSION >= (5, 24) else "past_key_values"

# Goes when 5.23 is the oldest version. What begins the names of recomputing in training: `..._enable`, `..._kwargs`.
CHECKPOINTING = "activation_checkpointing" if VERSION >= (5, 23) else "gradient_checkpointing"


def accepts_past_key_values(forward):
    """Let callers of `forward(cache=...)` use the argument's older name as well. Goes with 5.40, as in the library."""
    if VERSION >= (5, 24):
        from transformers.utils.deprecation import deprecate_kwarg

        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)(forward)

    @functools.wraps(forward)
    def renamed(*args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            if kwargs.get("cache") is not None:
                raise ValueError("Got both `cache` and `past_key_values`, which are one argument. Pass one of them.")
            kwargs["cache"] = past_key_values
        return forward(*args, **kwargs)

    # PEFT looks here for the name.
    signature = inspect.signature(forward)
    renamed.__signature__ = signature.replace(
        parameters=[
            parameter.replace(name="past_key_values") if name == "cache" else parameter
            for name, parameter in signature.parameters.items()
        ]
    )
    return renamed


# Goes when 5.23 is the oldest version: before it, `prefill_chunk_size` gave each chunk all images.
CHUNKS_CAN_HAVE_IMAGES = VERSION >= (5, 23)


def put_into_package(name: str) -> None:
    """Make a module findable as an attribute of its package, as `import` does.

    The library's loader of remote code does not. dill, by which `datasets` sends functions to other processes, looks for
    classes there; those that it does not find it sends as code, and it cannot make typed dictionaries of that again. Goes once
    the loader does it (not in 5.24).
    """
    package, _, short_name = name.rpartition(".")
    setattr(sys.modules[package], short_name, sys.modules[name])
