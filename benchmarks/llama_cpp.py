"""The text model by llama.cpp beside torch: `python -m benchmarks.llama_cpp`.

The 2.4B model with random weights. Torch computes in bfloat16. A case is llama.cpp's type of weights, and what runs
tower and connector beside it. Prompt and cache are those of an image of one tile and some text. Times are of runs in
turns, in one process; memory is the peak of a process of its own that loads the model, sees an image and writes a few
tokens. For each case a checkpoint is written, measured and deleted again, which takes up to 7 GB of disk.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from jina_vlm.compatibility_jina_vlm import CACHE_NAME

from jina_vlm_tools import markdown
from jina_vlm_tools.engines.gguf_folder import write_for_llama_cpp
from jina_vlm_tools.engines.llama_cpp import LlamaCppForConditionalGeneration
from jina_vlm_tools.engines.quantization import VISIONS
from jina_vlm_tools.files import TINY

from . import decoder, full_model
from .one_answer import compare, first_token, see, write_tokens
from .results import arguments, save
from .side_by_side import in_fresh_process, memory_bytes


TYPES = ("Q4_K_M", "Q8_0")
CASES = [f"{kind} {vision}" for vision in VISIONS for kind in TYPES]
MEASURED = ("Q4_K_M torch", "Q4_K_M onnx-int8", "Q4_K_M openvino-int8-a8", "Q8_0 torch")
TEXT_TOKENS = 88  # with an image of one tile: 512


def make_model(layers: int | None) -> JinaVLMForConditionalGeneration:
    config = full_model.small_tokenizers_config()
    if layers:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    return full_model.build(lambda: JinaVLMForConditionalGeneration(config), torch.bfloat16, "cpu")


def write_checkpoint(folder: Path, case: str, layers: int | None) -> int:
    """Returns the peak of memory beyond the weights themselves, which are in memory here, in bytes."""
    kind, vision = case.split()
    model, processor = make_model(layers), JinaVLMProcessor.from_pretrained(TINY)
    before = memory_bytes("RssAnon")
    write_for_llama_cpp(model, processor, folder, "random", kind, vision=VISIONS[vision])
    return memory_bytes("VmHWM") - before


def load(folder: Path | None, layers: int | None):
    """The model of a checkpoint for llama.cpp, or torch's."""
    if folder is None:
        return make_model(layers)
    return LlamaCppForConditionalGeneration.from_pretrained(folder).eval()


@torch.inference_mode()
def read_prompt(model, tokens: tuple) -> object:
    """The cache after a prompt."""
    ids, features = tokens
    return model(input_ids=ids, mm_encoder_outputs=features, use_cache=True, logits_to_keep=1)[CACHE_NAME]


def use_memory(folder: Path | None, layers: int | None) -> dict[str, int]:
    """Bytes of this process: the most that it held, and what of it no file backs, so that it could not be dropped."""
    model = load(folder, layers)
    see(model)
    write_tokens(model, read_prompt(model, make_prompt(model)), 8)
    return {"peak": memory_bytes("VmHWM"), "anonymous": memory_bytes("RssAnon")}


def make_prompt(model) -> tuple:
    torch.manual_seed(0)
    return decoder.prompt(model, images=1, rows=1, columns=1, text_tokens=TEXT_TOKENS)


def measure(case: str, folder: Path, rounds: int, tokens: int, layers: int | None) -> dict:
    beyond = in_fresh_process(write_checkpoint, folder, case, layers)
    memory = {name: in_fresh_process(use_memory, where, layers) for name, where in (("torch", None), (case, folder))}
    models = {"torch": load(None, layers), case: load(folder, layers)}
    prompt = make_prompt(models["torch"])
    return {
        "what": case,
        "tokens": prompt[0].shape[1],
        **compare(models, lambda model: read_prompt(model, prompt), rounds, tokens),
        "memory": memory,
        "disk": sum(path.stat().st_size for path in folder.iterdir()),
        "convert_beyond_weights": beyond,
    }


def table(rows: list[dict]) -> str:
    head = ["Text model", "Tower", "Image to first token, s", "To torch's: tower", "Prefill", "A token", "First token",
            "Memory", "Tokens a second", "Peak memory, GB", "of it not of files, GB", "Disk, GB"]  # fmt: skip
    lines = []
    for row in rows:
        for name in ("torch", row["what"]):
            is_torch, memory = name == "torch", row["memory"]
            first, of_torch = (first_token(row["seconds"], each) for each in (name, "torch"))
            ratios = [*row["ratios"].values(), first / of_torch, memory[name]["peak"] / memory["torch"]["peak"]]
            lines.append(
                [
                    *(("torch, bfloat16", "torch") if is_torch else name.split()),
                    f"{first:.1f}",
                    *("" if is_torch else f"**{value:.2f}**" for value in ratios),
                    f"{1 / row['seconds']['token'][name]:.1f}",
                    f"{memory[name]['peak'] / 1e9:.2f}",
                    f"{memory[name]['anonymous'] / 1e9:.2f}",
                    "" if is_torch else f"{row['disk'] / 1e9:.2f}",
                ]
            )
    return markdown.table(head, lines)


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument(
        "--cases", nargs="+", default=MEASURED, choices=CASES, metavar="CASE", help="(default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=8, help="decoded in each round (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="of the text model, for a trial (default: all 28)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written for a while (default: TMPDIR)")
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("llama.cpp is compared on the CPU: leave --device out")
    rows = []
    for case in args.cases:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            rows.append(measure(case, folder, args.rounds, args.tokens, args.layers))
        finally:
            shutil.rmtree(folder)
        print(table(rows[-1:]), flush=True)
    print(table(rows))
    if not args.layers:
        save("llama_cpp", rows)


if __name__ == "__main__":
    main()
