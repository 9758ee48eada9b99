"""VLMEvalKit, as it is installed, with jina-vlm and the drawn shapes among its models and benchmarks."""

import argparse
import functools
import sys
from pathlib import Path

from vlmeval import dataset, run
from vlmeval.config import supported_VLM

from .drawn_shapes import DrawnShapes
from .model import JinaVLM


DESCRIPTION = """\
All other arguments are VLMEvalKit's: --data names benchmarks, --work-dir the
folder of results, --judge exact_matching does without a judge where one would
only read answers. Results stand under the checkpoint's name.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.vlmevalkit",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="a native checkpoint: a folder or a repository of the Hub")
    parser.add_argument("--dtype", default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--max-tiles", type=int, help="of an image (default: the checkpoint's)")
    parser.add_argument("--no-resize", action="store_true", help="choose grids on the images' own sizes")
    args, others = parser.parse_known_args()
    given = {argument.split("=")[0] for argument in others}
    if "--model" in given:
        parser.error("--model is VLMEvalKit's name of a model; here --checkpoint names it")
    if "--data" not in given:
        parser.error("--data is missing: it names the benchmarks, such as MMStar; evaluation/README.md lists them")
    name = Path(args.checkpoint).resolve().name
    supported_VLM[name] = functools.partial(
        JinaVLM, args.checkpoint, dtype=args.dtype, do_resize=not args.no_resize, max_tiles=args.max_tiles
    )
    dataset.DATASET_CLASSES.append(DrawnShapes)
    sys.argv[1:] = ["--model", name, *others]
    run.main()


if __name__ == "__main__":
    main()
