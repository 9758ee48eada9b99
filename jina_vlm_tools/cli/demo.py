"""`demo`: show an image to a checkpoint, and watch it answer, step by step."""

import argparse
import os
import sys
import time
from pathlib import Path

from jina_vlm_tools import sources
from jina_vlm_tools.engines import check_engine

from . import options
from .ask import show
from .progress import Progress
from .steps import load_processor


DESCRIPTION = """\
Show an image to a checkpoint and watch it answer. Without --image one of colored
shapes is drawn, of the kind that the small checkpoint was trained on: from a
seed and of pairs of color and shape that training never drew.
"""
EXAMPLES = """\
examples:
  jina-vlm demo
  jina-vlm demo --image photo.png --question "How many stars are there?"
"""
DRAWN, DRAWN_BY = Path("demo.png"), "jina-vlm demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", metavar="PATH_OR_URL", help="an image; without one, one is drawn")
    parser.add_argument("--question", help="what to ask about it")
    parser.add_argument("--seed", type=int, help="of the image that is drawn (default: 1)")
    parser.add_argument("--language", choices=("en", "de", "es", "fr"), help="of the question about it (default: en)")
    options.add_model_options(parser)
    parser.add_argument("--checkpoint", action=OldModel, dest="model", help=argparse.SUPPRESS)
    parser.set_defaults(run=run, check=check)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for option in ("seed", "language"):
        if args.image and getattr(args, option) is not None:
            parser.error(f"--{option} is of an image that is drawn, and --image names one: leave one of them")


class OldModel(argparse.Action):
    """The name that `--model` had here."""

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"warning: {option_string} is called --model now, and will go.", file=sys.stderr)
        namespace.model = values


def draw(seed: int, language: str) -> tuple:
    """An image, which is saved, a question about it and the right answer.

    Raises:
        FileExistsError: something else has the file's name.
    """
    from PIL.PngImagePlugin import PngInfo

    from jina_vlm_tools.synthetic.questions import TASKS, evaluation_sample
    from jina_vlm_tools.synthetic.shapes import draw_scene

    sample = evaluation_sample(seed, TASKS[seed % len(TASKS)], language)
    image = draw_scene(sample.scene)
    if os.path.lexists(DRAWN) and not is_own():
        raise FileExistsError(f"{DRAWN} is something else. Move it away, or run this in another folder.")
    mark = PngInfo()
    mark.add_text("Software", DRAWN_BY)
    image.save(DRAWN, pnginfo=mark)
    return image, sample.turn.question, sample.turn.answer


def is_own() -> bool:
    """Whether an earlier run drew what is there."""
    from PIL import Image

    try:
        with Image.open(DRAWN) as there:
            return there.info.get("Software") == DRAWN_BY
    except OSError:
        return False


def run(args: argparse.Namespace) -> None:
    if args.image:
        sources.check_image(args.image)
    sources.check_model(args.model)
    check_engine(args.model, args.engine)
    started, progress = time.perf_counter(), Progress(sys.stdout)
    processor, load_model = load_processor(args.model, progress)
    from jina_vlm_tools.inference.conversation import Conversation, describe_images
    from jina_vlm_tools.inference.loading import load_image, load_on_device

    expected = None
    if args.image:
        image = load_image(args.image, processor.image_processor)
        question = args.question or options.default_question(args.model)
    else:
        image, question, expected = draw(1 if args.seed is None else args.seed, args.language or "en")
        question, expected = (args.question, None) if args.question else (question, expected)
        print(f"Drew an image: {DRAWN}")

    with progress.step("model", "Loading the model"):
        model = load_on_device(load_model, args.device, args.dtype)
        print(f"  {model.num_parameters():,} parameters on {model.device}, {model.dtype}")

    conversation = Conversation(model, processor, args.max_new_tokens, max_tiles=args.max_tiles)
    with progress.step("tokens", "Making tiles and tokens"):
        inputs = conversation.prepare(question, [image])
        (made,) = describe_images(processor, [image], **conversation.settings)
        print(
            f"  {made['width']} x {made['height']} pixels became {made['tiles']} tiles of "
            f"{processor.image_processor.tile_size} pixels "
            f"(a grid of {made['rows']} x {made['columns']} and a thumbnail), "
            f"and these {made['tokens']} of the prompt's {inputs['input_ids'].shape[1]} tokens."
        )

    print(f"\nQuestion: {question}\nAnswer: ", end="", flush=True)
    answer = conversation.generate(inputs, show)
    print()
    if expected is not None:
        print(f"Right is: {expected}")
    print(
        f"\nFirst token after {answer.seconds_to_first_token:.2f} s, "
        f"all {answer.tokens} after {answer.seconds:.2f} s; {time.perf_counter() - started:.1f} s in all."
    )
