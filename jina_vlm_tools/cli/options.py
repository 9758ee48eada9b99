"""Arguments that several commands have."""

import argparse
import os
from pathlib import Path

from jina_vlm_tools.engines import ENGINES
from jina_vlm_tools.files import TINY, TINY_RETRIEVAL
from jina_vlm_tools.sources import MODEL_VARIABLE, RELEASED

from .progress import Progress


RETRIEVAL_VARIABLE = "JINA_VLM_RETRIEVAL_MODEL"
SHARD_SIZE = "2GB"
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
        "--max-crops",
        type=positive,
        metavar="N",
        help=(
            "at most so many tiles beside the thumbnail: fewer are faster, more see smaller print; the release calls "
            "it --max-crops (default: the checkpoint's, 12)"
        ),
    )


def add_no_resize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-resize",
        dest="do_resize",
        action="store_false",
        default=None,
        help=(
            "choose an image's tiles by its own size, as `jina-vlm ask` and the release's own command do, without a "
            "fit to a budget of pixels (default: the checkpoint's setting, a fit)"
        ),
    )


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {what}, and nothing else, on stdout")


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model`: one rule for every verb that loads a model."""
    parser.add_argument(
        "-m",
        "--model",
        default=os.environ.get(MODEL_VARIABLE) or (str(TINY) if TINY.is_dir() else RELEASED),
        help=(
            f"{MODEL_HELP} (default: the environment variable {MODEL_VARIABLE}; without it the small checkpoint in a "
            f"checkout, else {RELEASED}, fetched once: 9.9 GB, CC BY-NC 4.0; now %(default)s)"
        ),
    )


def add_retrieval_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        help=(
            "what embeds: a folder or a repository of the Hub with an adapter and a projector for retrieval, or a "
            "checkpoint as it is, which makes dense vectors only (default: the one that made the index; for a new one "
            f"the environment variable {RETRIEVAL_VARIABLE}, without it checkpoints/tiny-retrieval in a checkout)"
        ),
    )


def default_retrieval_model() -> str:
    """What embeds, where neither an option nor an index says.

    Raises:
        ValueError: there is none.
    """
    if name := os.environ.get(RETRIEVAL_VARIABLE):
        return name
    if TINY_RETRIEVAL.is_dir():
        return str(TINY_RETRIEVAL)
    raise ValueError(
        "There is no model for retrieval here. Give --model, or the environment variable "
        f"{RETRIEVAL_VARIABLE}, a folder or a repository of the Hub that holds an adapter and a projector, as "
        "`jina-vlm train` makes them (docs/retrieval.md); or a checkpoint as it is, which makes dense vectors only, "
        "and has not learned to find pages."
    )


def add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        metavar="KIND:PLACE",
        help="a database beside the index: qdrant:URL or qdrant:FOLDER, lancedb:FOLDER (default: the index itself)",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help=(
            "of the computation; auto is the checkpoint's own (default: bfloat16 for models of a billion parameters "
            "and more: the release's float32 shards would take 9.9 GB of memory, and take half of that; for smaller "
            "ones float32 on a CPU, auto elsewhere)"
        ),
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help='such as "cpu" or "cuda:1" (default: a GPU if there is one)')


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="what runs the model (default: what the checkpoint is for; `jina-vlm convert --to gguf` makes one for "
        "llama.cpp, which runs the text, `--to onnx` and `--to openvino` make one that these run as a whole)",
    )


def add_max_new_tokens(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--max-new-tokens",
        "--max-tokens",
        type=positive,
        default=default,
        metavar="N",
        help="longest answer (default: %(default)s)",
    )


def add_model_options(parser: argparse.ArgumentParser, max_new_tokens: int = 256) -> None:
    add_model(parser)
    add_max_tiles(parser)
    add_max_new_tokens(parser, max_new_tokens)
    add_engine(parser)
    add_dtype(parser)
    add_device(parser)


def is_tiny(model: str) -> bool:
    """Whether it is the small checkpoint of a checkout."""
    return Path(model).resolve() == TINY.resolve()


def note_tiny(model: str, progress: Progress) -> None:
    """Say what the small checkpoint cannot do."""
    if is_tiny(model):
        progress.say(
            "  checkpoints/tiny knows drawn shapes and nothing else. For other images: "
            f"--model {RELEASED}, or the variable {MODEL_VARIABLE}."
        )


def default_question(model: str) -> str:
    """The small checkpoint knows the words that it was trained on, and no others."""
    return f"Describe the {'picture' if is_tiny(model) else 'image'}."
