"""`serve`: OpenAI's API, by the library's server."""

import argparse
from contextlib import nullcontext
from pathlib import Path

from jina_vlm_tools.engines import FOLDERS, check_engine
from jina_vlm_tools.extras import needing

from . import options


DESCRIPTION = "Serve a checkpoint over HTTP by `transformers serve`, whose options these are."


def run(arguments: list[str]) -> None:
    arguments = take_engine(arguments)
    # The server asks for its extra when it starts, by an error of its own; its help needs none.
    with nullcontext() if "--help" in arguments else needing("serve"):
        from jina_vlm_tools.inference.serve import serve
    serve(arguments)


def take_engine(arguments: list[str]) -> list[str]:
    """
    Check `--engine`, which is ours, against the folder that is to be served.

    Returns:
        The arguments without it, which are the library's.

    Raises:
        ValueError: the folder is for another engine, or none is named.
    """
    parser = argparse.ArgumentParser("jina-vlm serve", add_help=False, allow_abbrev=False)
    options.add_engine(parser)
    args, others = parser.parse_known_args(arguments)
    folders = [name for name in others if Path(name).is_dir()]
    if args.engine in FOLDERS and not folders:
        made = f"`jina-vlm convert --to {FOLDERS[args.engine].format}` made"
        raise ValueError(f"--engine {args.engine}: name the folder that {made}.")
    for folder in folders:
        check_engine(folder, args.engine)
    return others
