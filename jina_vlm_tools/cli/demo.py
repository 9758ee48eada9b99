"""`demo`: show an image to a checkpoint, and watch it answer, step by step."""

import argparse
import sys
import time
from pathlib import Path

from jina_vlm_tools.files import default_checkpoint

from .ask import show
from .options import DTYPES, add_max_tiles, check_image, check_model, positive
from .progress import Progress


DESCRIPTION = """\
Show an image to a checkpoint and watch it answer. Without --image one of colored
shapes is drawn, of the kind that the small checkpoint was trained on: from a
seed and of pairs of color and shape that training never drew.
"""
EXAMPLES = """\
examples:
  jina-vlm demo
  jina-vlm demo --image photo.png --question "What color is the star?"
"""
DRAWN = Path("demo.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", metavar="PATH_OR_URL", help="an image; without one, one is drawn")
    parser.add_argument("--question", help="what to ask about it")
    parser.add_argument("--seed", type=int, default=1, help="of the image that is drawn (default: %(default)s)")
    parser.add_argument("--language", choices=("en", "de", "es", "fr"), default="en", help="of the question about it")
    parser.add_argument(
        "--checkpoint",
        default=default_checkpoint(),
        help="a folder or a repository of the Hub, in this layout or the released one (default: %(default)s)",
    )
    add_max_tiles(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: float32 on a CPU, the checkpoint's own on a GPU)")
    parser.set_defaults(run=run)


def draw(seed: int, language: str) -> tuple:
    """An image, its file, a question about it and the right answer."""
    from jina_vlm_tools.synthetic.questions import TASKS, evaluation_sample
    from jina_vlm_tools.synthetic.shapes import draw_scene

    sample = evaluation_sample(seed, TASKS[seed % len(TASKS)], language)
    image = draw_scene(sample.scene)
    image.save(DRAWN)
    return image, sample.turn.question, sample.turn.answer


def run(args: argparse.Namespace) -> None:
    if args.image:
        check_image(args.image)
    check_model(args.checkpoint)
    started, progress = time.perf_counter(), Progress(sys.stdout)
    with progress.step("import", "Importing torch and transformers"):
        from jina_vlm_tools.inference.conversation import Conversation, describe_images
        from jina_vlm_tools.inference.loading import (
            load_image,
            load_on_device,
            load_processor_and_class,
            quiet_libraries,
        )

        quiet_libraries()
    with progress.step("processor", f"Loading the processor of {args.checkpoint}"):
        processor, load_model = load_processor_and_class(args.checkpoint)

    expected = None
    if args.image:
        image, question = load_image(args.image, processor.image_processor), args.question or "Describe the picture."
    else:
        image, question, expected = draw(args.seed, args.language)
        question, expected = (args.question, None) if args.question else (question, expected)
        print(f"Drew an image: {DRAWN}")

    with progress.step("model", "Loading the model"):
        model = load_on_device(load_model, dtype=args.dtype)
        print(f"  {model.num_parameters():,} parameters on {model.device}, {model.dtype}")

    conversation = Conversation(model, processor, args.max_new_tokens, args.max_tiles)
    with progress.step("tokens", "Making tiles and tokens"):
        inputs = conversation.prepare(question, [image])
        (made,) = describe_images(processor, [image], args.max_tiles)
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
