"""Show a picture to a checkpoint, and watch it answer: `make demo`, or

    python demo.py --image photo.png --question "What colour is the star?"

Without `--image` a picture of coloured shapes is drawn, of the kind that `checkpoints/tiny` was trained on; from a seed and
of pairs of colour and shape that training never drew.
"""

import argparse
import sys
import time
from pathlib import Path

from jina_vlm_cli.ask import show
from jina_vlm_cli.loading import load_on_device, load_processor_and_class, open_picture, quiet_libraries
from jina_vlm_cli.options import check_model, check_picture
from jina_vlm_cli.progress import Progress


ROOT = Path(__file__).parent
CHECKPOINT = ROOT / "checkpoints" / "tiny"
DRAWN = ROOT / "demo.png"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", metavar="PATH_OR_URL", help="a picture; without one, one is drawn")
    parser.add_argument("--question", help="what to ask about it")
    parser.add_argument("--seed", type=int, default=1, help="of the picture that is drawn (default: %(default)s)")
    parser.add_argument("--language", choices=("en", "de", "es", "fr"), default="en", help="of the question about it")
    parser.add_argument(
        "--checkpoint",
        default=str(CHECKPOINT),
        help="a folder or a repository of the Hub, in this layout or the released one (default: checkpoints/tiny)",
    )
    parser.add_argument("--max-tiles", type=int, metavar="N", help="at most so many tiles beside the thumbnail")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--dtype", help='such as "bfloat16" (default: float32 on a CPU, the checkpoint\'s own on a GPU)')
    args = parser.parse_args()
    if args.image:
        check_picture(args.image)
    if Path(args.checkpoint).resolve() == CHECKPOINT and not CHECKPOINT.is_dir():
        sys.exit("checkpoints/tiny is not there. Fetch it with the repository, or pass another with --checkpoint.")
    check_model(args.checkpoint)
    return args


def draw(seed: int, language: str) -> tuple:
    """A picture, its file, a question about it and the right answer."""
    from training.questions import TASKS, evaluation_sample
    from training.shapes import draw_scene

    sample = evaluation_sample(seed, TASKS[seed % len(TASKS)], language)
    picture = draw_scene(sample.scene)
    picture.save(DRAWN)
    return picture, sample.turn.question, sample.turn.answer


def main() -> None:
    args = parse_args()
    started, progress = time.perf_counter(), Progress(sys.stdout)
    with progress.step("import", "Importing torch and transformers"):
        from jina_vlm_cli.conversation import Conversation, describe_pictures

        quiet_libraries()
    with progress.step("processor", f"Loading the processor of {args.checkpoint}"):
        processor, load_model = load_processor_and_class(args.checkpoint)

    expected = None
    if args.image:
        picture, question = open_picture(args.image, processor.image_processor), args.question or "Describe the picture."
    else:
        picture, question, expected = draw(args.seed, args.language)
        question, expected = (args.question, None) if args.question else (question, expected)
        print(f"Drew a picture: {DRAWN}")

    with progress.step("model", "Loading the model"):
        model = load_on_device(load_model, dtype=args.dtype)
        print(f"  {model.num_parameters():,} parameters on {model.device}, {model.dtype}")

    conversation = Conversation(model, processor, args.max_new_tokens, args.max_tiles)
    with progress.step("tokens", "Making tiles and tokens"):
        inputs = conversation.prepare(question, [picture])
        (made,) = describe_pictures(processor, [picture], args.max_tiles)
        print(
            f"  {made['width']} x {made['height']} pixels became {made['tiles']} tiles of {processor.image_processor.tile_size} pixels "
            f"(a grid of {made['rows']} x {made['columns']} and a thumbnail), and these {made['tokens']} of the prompt's {inputs['input_ids'].shape[1]} tokens."
        )

    print(f"\nQuestion: {question}\nAnswer: ", end="", flush=True)
    answer = conversation.generate(inputs, show)
    print()
    if expected is not None:
        print(f"Right is: {expected}")
    print(
        f"\nFirst token after {answer.seconds_to_first_token:.2f} s, all {answer.tokens} after {answer.seconds:.2f} s; "
        f"{time.perf_counter() - started:.1f} s in all."
    )


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
