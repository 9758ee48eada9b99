"""`app`: a page to try the model on.

Image and question in, streamed answer out, several turns, and a view of how the image was tiled, with the tokens and
the time of each part. With a retrieval folder, a second tab: files in, the pages that match a question out, and an
answer from one of them. `jina_vlm_tools.webapp.assemble_space` makes a Space of it.
"""

import argparse
from typing import TYPE_CHECKING

from jina_vlm_tools import sources
from jina_vlm_tools.engines import TORCH, check_engine
from jina_vlm_tools.extras import missing, needing
from jina_vlm_tools.files import TINY_RETRIEVAL

from . import options


if TYPE_CHECKING:
    from jina_vlm_tools.webapp.search_tab import SearchTab


DESCRIPTION = "Open a page in the browser to ask a checkpoint about images."
EXAMPLES = """\
examples:
  jina-vlm app
  jina-vlm app --model jinaai/jina-vlm --port 9000
  jina-vlm app --retrieval checkpoints/tiny-retrieval
"""
RETRIEVAL_ADVICE = (
    "Give --retrieval a folder, or a repository of the Hub, that holds an adapter and a projector, such as "
    "checkpoints/tiny-retrieval."
)
TINY_NOTE = (
    "The small checkpoint knows drawn, colored shapes, in English, German, Spanish and French, and nothing else."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_dtype(parser)
    options.add_device(parser)
    parser.add_argument(
        "--retrieval",
        metavar="FOLDER",
        help=(
            "an adapter and a projector of the model, a folder or a repository of the Hub: the page has a tab that "
            "searches images and PDFs (default: checkpoints/tiny-retrieval for the small checkpoint, where it is and "
            'what `pip install ".[search]"` brings, else none)'
        ),
    )
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    sources.check_model(args.model)
    retrieval = args.retrieval or _find_retrieval(args.model)
    if retrieval:
        sources.check_model(retrieval, "--retrieval", RETRIEVAL_ADVICE)
    check_engine(args.model, TORCH if retrieval else None)
    print(f"Loading {args.model} ...", flush=True)
    with needing("app"):
        from jina_vlm_tools.webapp.layout import Page, launch_arguments
    from jina_vlm_tools.inference.loading import load_on_device, load_processor_and_class, quiet_libraries

    quiet_libraries()
    processor, load_model = load_processor_and_class(args.model)
    model = load_on_device(load_model, args.device, args.dtype)
    is_tiny = options.is_tiny(args.model)
    name, note = ("checkpoints/tiny", TINY_NOTE) if is_tiny else (args.model, "")
    search = _load_search(model, processor, retrieval) if retrieval else None
    page = Page(model, processor, name, note, search)
    page.build().launch(server_port=args.port, **launch_arguments())


def _find_retrieval(model: str) -> str | None:
    """The small checkpoint's own, where all is there that it needs: nobody who only chats is asked to install it."""
    is_there = options.is_tiny(model) and TINY_RETRIEVAL.is_dir() and not missing("search")
    return str(TINY_RETRIEVAL) if is_there else None


def _load_search(model, processor, folder: str) -> "SearchTab":
    with needing("search", "`jina-vlm app --retrieval`"):
        from jina_vlm_tools.webapp.search_tab import SearchTab
        from jina_vlm_tools.webapp.searching import load_embedder
    print(f"Loading {folder} ...", flush=True)
    return SearchTab(load_embedder(model, folder), model, processor)
