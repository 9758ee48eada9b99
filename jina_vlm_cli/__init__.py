# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""The command `jina-vlm`. A package beside `jina_vlm`, whose import takes torch and transformers with it: here that waits
until arguments are known to be good.

    main          the command's parser, its errors and exit codes
    ask, chat     talk to a checkpoint, by `conversation` and `loading`
    tiles         what becomes of a picture, by `tiling`, which computes it, and `drawing`
    publish       `convert` and `upload`, by `publishing`
    options       arguments that several of them have
    progress      what is being done, on stderr
"""

from pathlib import Path


_BESIDE = Path(__file__).resolve().parent.parent
# The folder of the package `jina_vlm`, with the bundle's modules, LICENSE, pyproject.toml and chat_template.jinja.
# A checkout is this folder itself.
ROOT = _BESIDE / "jina_vlm" if (_BESIDE / "jina_vlm").is_dir() else _BESIDE
