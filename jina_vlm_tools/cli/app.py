"""`app`: a page to try the model on.

Image and question in, streamed answer out, several turns, and a view of how the image was tiled, with the tokens and
the time of each part. `jina_vlm_tools.webapp.assemble_space` makes a Space of it.
"""

import argparse

from . import options


DESCRIPTION = "Open a page in the browser to ask a checkpoint about images."
EXAMPLES = """\
examples:
  jina-vlm app
  jina-vlm app --model jinaai/jina-vlm --port 9000
"""
TINY_NOTE = (
    "The small checkpoint knows drawn, colored shapes, in English, German, Spanish and French, and nothing else."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_dtype(parser)
    options.add_device(parser)
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    options.check_model(args.model)
    print(f"Loading {args.model} ...", flush=True)
    with options.needing("app"):
        from jina_vlm_tools.webapp.layout import Page, launch_arguments
    from jina_vlm_tools.inference.loading import load_on_device, load_processor_and_class, quiet_libraries

    quiet_libraries()
    processor, load_model = load_processor_and_class(args.model)
    model = load_on_device(load_model, args.device, args.dtype)
    is_tiny = options.is_tiny(args.model)
    page = Page(model, processor, "checkpoints/tiny" if is_tiny else args.model, TINY_NOTE if is_tiny else "")
    page.build().launch(server_port=args.port, **launch_arguments())
