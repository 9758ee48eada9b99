"""A page to try the model on: `make app`, or `python app.py`.

Picture and question in, streamed answer out, several turns, and a view of how the picture was tiled, with the tokens and the
time of each part. The checkpoint is `--model`, else the environment variable `JINA_VLM_MODEL`, else `checkpoints/tiny` where it
is there, else the released one, `jinaai/jina-vlm`.

A Space of the Hub runs this file. `python -m jina_vlm_tools.webapp.space FOLDER` puts together what it needs; `jina_vlm_tools/webapp/space/README.md` is its front
page, whose front matter says what runs it.
"""

import argparse
import os
import sys
from pathlib import Path

from jina_vlm_tools.inference.loading import load_on_device, load_processor_and_class, quiet_libraries
from .options import MODEL_HELP, MODEL_VARIABLE, RELEASED, check_model


TINY = Path(__file__).parent / "checkpoints" / "tiny"
TINY_NOTE = "The small checkpoint knows drawn, coloured shapes, in English, German, Spanish and French, and nothing else."


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=os.environ.get(MODEL_VARIABLE) or (str(TINY) if TINY.is_dir() else RELEASED), help=f"{MODEL_HELP} (default: %(default)s)"
    )
    parser.add_argument("--device", help='such as "cpu" or "cuda:1" (default: a GPU if there is one)')
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="(default: float32 on a CPU, the checkpoint's own elsewhere)")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_model(args.model)
    print(f"Loading {args.model} ...", flush=True)
    from jina_vlm_tools.webapp.layout import Page, launch_arguments

    quiet_libraries()
    processor, load_model = load_processor_and_class(args.model)
    model = load_on_device(load_model, args.device, args.dtype)
    is_tiny = Path(args.model).resolve() == TINY.resolve()
    page = Page(model, processor, "checkpoints/tiny" if is_tiny else args.model, TINY_NOTE if is_tiny else "")
    page.build().launch(server_port=args.port, **launch_arguments())


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
