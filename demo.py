"""Show a picture to a checkpoint, and watch it answer: `make demo`, or

    python demo.py --image photo.png --question "What colour is the star?"

Without `--image` a picture of coloured shapes is drawn, of the kind that `checkpoints/tiny` was trained on; from a seed and
of pairs of colour and shape that training never drew.
"""

import argparse
import sys
import time
from contextlib import contextmanager
from pathlib import Path


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
    parser.add_argument("--max-tiles", type=int, metavar="1..12", help="at most so many tiles beside the thumbnail")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--dtype", help='such as "bfloat16" (default: float32 on a CPU, the checkpoint\'s own on a GPU)')
    args = parser.parse_args()
    if args.image and not args.image.startswith(("http://", "https://", "data:")) and not Path(args.image).is_file():
        what = "is a folder" if Path(args.image).is_dir() else "does not exist"
        sys.exit(f"IMAGE={args.image}: {what}. Expected a picture's path or URL. Leave it out to have one drawn.")
    if not Path(args.checkpoint).is_dir():
        if Path(args.checkpoint).resolve() == CHECKPOINT:
            sys.exit("checkpoints/tiny is not there. Train it with `make train-tiny`, or pass another with --checkpoint.")
        if args.checkpoint.startswith((".", "/")) or args.checkpoint.count("/") != 1:
            sys.exit(f"{args.checkpoint}: neither a folder nor the name of a repository on the Hub (owner/name).")
    return args


@contextmanager
def step(what: str):
    """Says what is being done, and how long it took."""
    print(f"{what} ...", flush=True)
    start = time.perf_counter()
    yield
    print(f"  {time.perf_counter() - start:.1f} s", flush=True)


def draw(seed: int, language: str) -> tuple:
    """A picture, its file, a question about it and the right answer."""
    from training.questions import TASKS, evaluation_sample
    from training.shapes import draw_scene

    sample = evaluation_sample(seed, TASKS[seed % len(TASKS)], language)
    picture = draw_scene(sample.scene)
    picture.save(DRAWN)
    return picture, sample.turns[-1].question, sample.turns[-1].answer


def load_processor_and_class(checkpoint: str):
    """A folder that holds the modules runs them; anything else is run by this checkout's own code, with none of its own."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    is_bundle = Path(checkpoint, "modeling_jina_vlm.py").is_file()
    if not is_bundle:
        try:
            import jina_vlm  # noqa: F401  registers the classes
        except ImportError as error:
            sys.exit(f"{checkpoint} brings no code of this layout, and the package is not installed ({error}): pip install .")
    try:
        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=is_bundle)
    except OSError as error:
        sys.exit(f"{checkpoint}: {error}")
    return processor, lambda **kwargs: AutoModelForImageTextToText.from_pretrained(
        checkpoint, trust_remote_code=is_bundle, **kwargs
    )


def describe(picture, tile_positions, input_ids, processor) -> str:
    """What became of the picture."""
    _, _, rows, columns = tile_positions[0].tolist()
    image_tokens = sum((input_ids == token).sum().item() for token in processor.image_token_ids)
    return (
        f"  {picture.width} x {picture.height} pixels became {1 + rows * columns} tiles of {processor.image_processor.tile_size} "
        f"pixels (a grid of {rows} x {columns} and a thumbnail), and these {image_tokens} of the prompt's {input_ids.shape[1]} tokens."
    )


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    with step("Importing torch and transformers"):
        import torch
        import transformers
        from transformers import TextStreamer

    class TimedStreamer(TextStreamer):
        """Prints the answer while it is generated. The first thing put is the prompt."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.times = []

        def put(self, value):
            self.times.append(time.perf_counter())
            super().put(value)

    with step(f"Loading the processor of {args.checkpoint}"):
        processor, load_model = load_processor_and_class(args.checkpoint)

    expected = None
    if args.image:
        try:
            picture = processor.image_processor.fetch_images(args.image)
            picture.load()
        except (OSError, ValueError) as error:
            sys.exit(f"IMAGE={args.image}: {error}")
        question = args.question or "Describe the picture."
    else:
        picture, question, expected = draw(args.seed, args.language)
        question, expected = (args.question, None) if args.question else (question, expected)
        print(f"Drew a picture: {DRAWN}")

    with step("Making tiles and tokens"):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        limits = {} if args.max_tiles is None else {"max_tiles": args.max_tiles}
        try:
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=limits,
            )
        except (OSError, ValueError) as error:
            sys.exit(f"The picture or the question cannot be used: {error}")
        print(describe(picture, inputs["tile_positions"], inputs["input_ids"], processor))

    with step("Loading the model"):
        transformers.logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(dtype=args.dtype or ("auto" if device == "cuda" else "float32")).eval().to(device)
        print(f"  {model.num_parameters():,} parameters on {device}, {model.dtype}")

    print(f"\nQuestion: {question}\nAnswer:", end="", flush=True)
    streamer = TimedStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    model.generate(**inputs.to(device), max_new_tokens=args.max_new_tokens, do_sample=False, streamer=streamer)
    end = time.perf_counter()
    if expected is not None:
        print(f"Right is: {expected}")
    tokens = len(streamer.times) - 1
    print(f"\nFirst token after {streamer.times[1] - start:.2f} s, all {tokens} after {end - start:.2f} s; {end - started:.1f} s in all.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
