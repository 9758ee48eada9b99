"""Arguments that several commands have, and what can be said of them before anything is loaded."""

import argparse
import os
import re
from pathlib import Path


RELEASED = "jinaai/jina-vlm"
MODEL_VARIABLE = "JINA_VLM_MODEL"
STDIN = "-"
DTYPES = ("auto", "float32", "bfloat16", "float16")
MODEL_HELP = "a folder or a repository of the Hub, in the released layout or this project's"


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def add_max_tiles(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-tiles",
        type=positive,
        metavar="N",
        help=(
            "at most so many tiles beside the thumbnail: fewer are faster, more see smaller print (default: "
            "the checkpoint's, 12)"
        ),
    )


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {what}, and nothing else, on stdout")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=os.environ.get(MODEL_VARIABLE) or RELEASED,
        help=(
            f"{MODEL_HELP} (default: the environment variable {MODEL_VARIABLE}, else {RELEASED}, fetched once; "
            "its weights are CC BY-NC 4.0)"
        ),
    )
    add_max_tiles(parser)
    parser.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the computation (default: float32 on a CPU, the checkpoint's own, auto, elsewhere)",
    )
    parser.add_argument("--device", help='such as "cpu" or "cuda:1" (default: a GPU if there is one)')


def check_model(name: str) -> None:
    """
    Raises:
        ValueError: neither a folder nor the name of a repository.
    """
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ValueError(f"{name}: neither a folder nor the name of a repository on the Hub (owner/name).")


def check_image(source: str) -> None:
    """
    Raises:
        FileNotFoundError, IsADirectoryError: a path that leads to no file.
    """
    # A URL is judged where it is opened.
    if source == STDIN or re.match("[a-z]{2,}:", source, flags=re.IGNORECASE) or Path(source).is_file():
        return
    if Path(source).is_dir():
        raise IsADirectoryError(f"{source} is a folder. Name one image in it.")
    raise FileNotFoundError(f"{source}: no such image. Expected a path, an http(s) URL, a data URI, or - for stdin.")


def check_images(sources: list[str]) -> None:
    for source in sources:
        check_image(source)
    if sources.count(STDIN) > 1:
        raise ValueError("- stands for one image on stdin, and was given several times.")
