"""The model by ONNX Runtime and OpenVINO beside torch: `python -m benchmarks.graphs`.

The 2.4B widths with random weights, with 4 and with 2 blocks of tower and text model each; torch computes in bfloat16.
Times are of runs in turns, in one process: tower and connector on one tile, a prompt of 512 tokens, tokens after it.
Memory is the peak of a process of its own that does these once. What two more blocks cost is carried over to all: 25
of the tower, 28 of the text model. Checkpoints are written for a while, which takes up to 10 GB of disk.
"""

import gc
import statistics
import tempfile
from pathlib import Path

import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from jina_vlm.compatibility_jina_vlm import CACHE_NAME
from transformers import AutoModelForImageTextToText

from jina_vlm_tools import markdown
from jina_vlm_tools.engines import ONNX, OPENVINO
from jina_vlm_tools.engines.graph_folder import write_for_graphs
from jina_vlm_tools.engines.quantization import GRAPH_QUANTIZATIONS
from jina_vlm_tools.files import TINY

from . import full_model
from .results import arguments, save
from .side_by_side import in_fresh_process, memory_bytes, take_turns


DEPTHS = (2, 4)
ALL = {"tower": 25, "prompt": 28, "token": 28}
PROMPT = 512
WHOLE = "float32"
CASES = [f"{engine} {kind}" for engine in (ONNX, OPENVINO) for kind in (WHOLE, *GRAPH_QUANTIZATIONS)]


def make_model(layers: int) -> JinaVLMForConditionalGeneration:
    config = full_model.small_tokenizers_config()
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = layers
    config.text_config.layer_types = config.text_config.layer_types[:layers]
    config.vision_feature_layers = [layers - 1, 0]
    return full_model.build(lambda: JinaVLMForConditionalGeneration(config), torch.bfloat16, "cpu")


def write_checkpoint(folder: Path, case: str, layers: int) -> int:
    """Returns the peak of memory beyond the weights themselves, which are in memory here, in bytes."""
    engine, kind = case.split()
    model = make_model(layers)
    before = memory_bytes("RssAnon")
    processor = JinaVLMProcessor.from_pretrained(TINY)
    write_for_graphs(model, processor, folder, engine, None if kind == WHOLE else kind)
    return memory_bytes("VmHWM") - before


def load(folder: Path | None, layers: int):
    """The model of a checkpoint for an engine, or torch's."""
    return make_model(layers) if folder is None else AutoModelForImageTextToText.from_pretrained(folder)


@torch.inference_mode()
def see(model) -> None:
    """An image of one tile, which is its own thumbnail."""
    pixels = torch.linspace(-1, 1, 3 * 378 * 378).view(1, 3, 378, 378).repeat(2, 1, 1, 1)
    model.get_image_features(pixels.to(model.dtype), torch.tensor([[-1, -1, 1, 1], [0, 0, 1, 1]]))


@torch.inference_mode()
def read_prompt(model):
    return model(input_ids=torch.arange(PROMPT)[None], use_cache=True, logits_to_keep=1)[CACHE_NAME]


@torch.inference_mode()
def write_tokens(model, cache, tokens: int) -> None:
    """So many, one after the other; the cache is left as it was."""
    for _ in range(tokens):
        model(input_ids=torch.full((1, 1), 1000), use_cache=True, **{CACHE_NAME: cache})
    cache.crop(-tokens)


def use_memory(folder: Path | None, layers: int) -> int:
    """Bytes that this process held at most."""
    model = load(folder, layers)
    see(model)
    write_tokens(model, read_prompt(model), 8)
    return memory_bytes("VmHWM")


def carry_over(fewer: float, more: float, layers: int) -> float:
    """From what both depths take to what so many layers take."""
    return more + (more - fewer) / (DEPTHS[1] - DEPTHS[0]) * (layers - DEPTHS[1])


def measure(case: str, folder: Path, rounds: int, tokens: int, torch_memory: list[int]) -> dict:
    folders = [folder / str(layers) for layers in DEPTHS]
    for each in folders:
        each.mkdir()
    beyond = [
        in_fresh_process(write_checkpoint, each, case, layers) for each, layers in zip(folders, DEPTHS, strict=True)
    ]
    memory = [in_fresh_process(use_memory, each, layers) for each, layers in zip(folders, DEPTHS, strict=True)]
    models = {
        (name, layers): load(each if name == case else None, layers)
        for name in ("torch", case)
        for each, layers in zip(folders, DEPTHS, strict=True)
    }
    caches = {key: read_prompt(model) for key, model in models.items()}
    seconds = {
        "tower": take_turns({key: lambda m=m: see(m) for key, m in models.items()}, rounds),
        "prompt": take_turns({key: lambda m=m: read_prompt(m) for key, m in models.items()}, rounds),
        "token": take_turns(
            {key: lambda k=key, m=m: write_tokens(m, caches[k], tokens) for key, m in models.items()}, rounds
        ),
    }
    row = {"what": case, "seconds": {}, "ratios": {}}
    for what, times in seconds.items():
        whole = {}
        for name in ("torch", case):
            both = zip(*(times[name, layers] for layers in DEPTHS), strict=True)
            whole[name] = [carry_over(*pair, ALL[what]) / (tokens if what == "token" else 1) for pair in both]
        row["seconds"][what] = {name: statistics.median(values) for name, values in whole.items()}
        pairs = zip(whole[case], whole["torch"], strict=True)
        row["ratios"][what] = statistics.median(one / other for one, other in pairs)
    sizes = [sum(path.stat().st_size for path in each.iterdir()) for each in folders]
    for name, pair in (("memory", memory), ("disk", sizes), ("convert_beyond_weights", beyond)):
        row[name] = carry_over(*pair, ALL["token"])
    row["torch_memory"] = carry_over(*torch_memory, ALL["token"])
    return row


def table(rows: list[dict]) -> str:
    head = ["Engine and weights", "Tower", "Prompt", "Token", "Peak memory, GB", "Disk, GB"]
    lines = []
    for row in rows:
        if not lines:
            of_torch = [f"{row['seconds'][what]['torch']:.2f} s" for what in ALL]
            lines.append(["torch, bfloat16", *of_torch, f"{row['torch_memory'] / 1e9:.1f}", ""])
        lines.append(
            [
                row["what"].replace(" ", ", "),
                *(f"{row['ratios'][what]:.2f}" for what in ALL),
                f"{row['memory'] / 1e9:.1f}",
                f"{row['disk'] / 1e9:.1f}",
            ]
        )
    return markdown.table(head, lines)


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES, metavar="CASE", help="(default: all)")
    parser.add_argument("--tokens", type=int, default=8, help="decoded in each round (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written for a while (default: TMPDIR)")
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("engines are compared on the CPU: leave --device out")
    torch_memory, rows = [in_fresh_process(use_memory, None, layers) for layers in DEPTHS], []
    for case in args.cases:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append(measure(case, Path(folder), args.rounds, args.tokens, torch_memory))
        gc.collect()
        print(table(rows[-1:]), flush=True)
        save("graphs", rows)
    print(table(rows))


if __name__ == "__main__":
    main()
