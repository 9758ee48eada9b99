"""`batch`: a question about every image of a folder, of parquet files or of a data set."""

import argparse
from pathlib import Path

from jina_vlm_tools import sources
from jina_vlm_tools.engines import check_engine
from jina_vlm_tools.extras import needing

from . import options


DESCRIPTION = """\
Answer a question about every image of a folder, of parquet files or of a data
set, on one machine or many. The output is a folder of parts; the same command,
run again after whatever stopped it, answers those that are missing.
"""
EXAMPLES = """\
examples:
  jina-vlm batch photos --question "What is shown?" --output answers
  accelerate launch --num_processes 8 -m jina_vlm_tools batch photos --output answers
  torchrun --nproc-per-node 2 -m jina_vlm_tools batch photos --output answers   # on CPUs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="a folder of images (looked through with its subfolders); a parquet file or a quoted pattern of these; "
        "a data set: a folder that `datasets` can load, or a name on the Hub",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder, or one to go on with")
    questions = parser.add_mutually_exclusive_group()
    questions.add_argument("--question", help="asked about each (default: Describe the image.)")
    questions.add_argument("--question-column", metavar="NAME", help="take each row's own question from here")
    parser.add_argument(
        "--image-column", metavar="NAME", help="images, their bytes or paths (default: the one column of images)"
    )
    parser.add_argument(
        "--id-column",
        metavar="NAME",
        help="what to call the rows (default: their paths in a folder, else their numbers)",
    )
    parser.add_argument("--subset", help="of a data set that has several")
    parser.add_argument("--split", help='of a data set that has several, such as "train" or "train[:100]"')
    parser.add_argument(
        "--format", choices=("parquet", "jsonl"), default="parquet", help="of the output (default: %(default)s)"
    )
    options.add_model(parser)
    options.add_engine(parser)
    options.add_dtype(parser)
    options.add_max_tiles(parser)
    options.add_no_resize(parser)
    options.add_max_new_tokens(parser, 256)
    parser.add_argument(
        "--batch-size",
        type=options.positive,
        default=8,
        help="images at a time; halved where memory runs out (default: %(default)s)",
    )
    parser.add_argument(
        "--rows-per-part",
        type=options.positive,
        default=64,
        help="of the output; what a kill can cost each process (default: %(default)s)",
    )
    parser.set_defaults(run=run, interrupted="The same command goes on from here.")


def run(args: argparse.Namespace) -> None:
    sources.check_model(args.model)
    check_engine(args.model, args.engine)
    if args.question is not None and not args.question.strip():
        raise ValueError("--question is empty. Say what to ask, or leave it out.")
    args.question = args.question or options.default_question(args.model)
    with needing("batch"):
        from jina_vlm_tools.inference.batch import answer_all
    answer_all(args)
