"""The model by ONNX Runtime and OpenVINO beside torch: `python -m benchmarks.graphs`.

The 2.4B model with random weights; torch computes in bfloat16. Times are of runs in turns, in one process: tower and
connector on one tile, a prompt of 512 tokens, tokens after it. Memory is the peak of a process of its own that loads
the model and does these once. For each case a checkpoint is written, measured and deleted again, which takes up to 17
GB of disk. Two need more than 24 GB of memory beside torch's model, OpenVINO in float32 and the writing of ONNX in
int8-a8: they are left out by default.
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
from jina_vlm_tools.engines.quantization import ACTIVATIONS, GRAPH_QUANTIZATIONS
from jina_vlm_tools.files import TINY

from . import full_model
from .one_answer import compare, first_token, see, write_tokens
from .results import arguments, save
from .side_by_side import in_fresh_process, memory_bytes


PARTS = ("tower", "prompt", "token")
PROMPT = 512
WHOLE = "float32"
CASES = [f"{engine} {kind}" for engine in (ONNX, OPENVINO) for kind in (WHOLE, *GRAPH_QUANTIZATIONS)]
MEASURED = [case for case in CASES if case not in (f"{OPENVINO} {WHOLE}", f"{ONNX} {ACTIVATIONS}")]


def make_model(layers: int | None) -> JinaVLMForConditionalGeneration:
    config = full_model.small_tokenizers_config()
    if layers:
        config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
        config.vision_feature_layers = [layers - 1, 0]
    return full_model.build(lambda: JinaVLMForConditionalGeneration(config), torch.bfloat16, "cpu")


def write_checkpoint(folder: Path, case: str, layers: int | None) -> int:
    """Returns the peak of memory beyond the weights themselves, which are in memory here, in bytes."""
    engine, kind = case.split()
    model = make_model(layers)
    before = memory_bytes("RssAnon")
    processor = JinaVLMProcessor.from_pretrained(TINY)
    write_for_graphs(model, processor, folder, engine, None if kind == WHOLE else kind)
    return memory_bytes("VmHWM") - before


def load(folder: Path | None, layers: int | None):
    """The model of a checkpoint for an engine, or torch's."""
    return make_model(layers) if folder is None else AutoModelForImageTextToText.from_pretrained(folder)


@torch.inference_mode()
def read_prompt(model):
    return model(input_ids=torch.arange(PROMPT)[None], use_cache=True, logits_to_keep=1)[CACHE_NAME]


def use_memory(folder: Path | None, layers: int | None) -> int:
    """Bytes that this process held at most."""
    model = load(folder, layers)
    see(model)
    write_tokens(model, read_prompt(model), 8)
    return memory_bytes("VmHWM")


def measure(case: str, folder: Path, whole, rounds: int, tokens: int, layers: int | None) -> dict:
    beyond = in_fresh_process(write_checkpoint, folder, case, layers)
    memory = in_fresh_process(use_memory, folder, layers)
    models = {"torch": whole, case: load(folder, layers)}
    return {
        "what": case,
        **compare(models, read_prompt, rounds, tokens),
        "memory": memory,
        "disk": sum(path.stat().st_size for path in folder.iterdir()),
        "convert_beyond_weights": beyond,
    }


def table(rows: list[dict], torch_memory: int) -> str:
    head = ["Engine and weights", "Tower", "Prompt", "A token", "First token", "Memory", "Tokens a second",
            "Peak memory, GB", "Disk, GB"]  # fmt: skip
    tower, prompt, token = (statistics.median(row["seconds"][what]["torch"] for row in rows) for what in PARTS)
    of_torch = [f"{each:.2f} s" for each in (tower, prompt, token, tower + prompt)]
    lines = [["torch, bfloat16", *of_torch, "", f"{1 / token:.1f}", f"{torch_memory / 1e9:.1f}", ""]]
    for row in rows:
        first, of_torch = (first_token(row["seconds"], name) for name in (row["what"], "torch"))
        ratios = [*(row["ratios"][what] for what in PARTS), first / of_torch, row["memory"] / torch_memory]
        lines.append(
            [
                row["what"].replace(" ", ", "),
                *(f"**{ratio:.2f}**" for ratio in ratios),
                f"{1 / row['seconds']['token'][row['what']]:.1f}",
                f"{row['memory'] / 1e9:.1f}",
                f"{row['disk'] / 1e9:.1f}",
            ]
        )
    return markdown.table(head, lines)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument(
        "--cases", nargs="+", default=MEASURED, choices=CASES, metavar="CASE", help="(default: %(default)s)"
    )
    parser.add_argument("--layers", type=int, help="of tower and text model, for a trial (default: all)")
    parser.add_argument("--tokens", type=int, default=8, help="decoded in each round (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written for a while (default: TMPDIR)")
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("engines are compared on the CPU: leave --device out")
    torch_memory, whole, rows = in_fresh_process(use_memory, None, args.layers), make_model(args.layers), []
    for case in args.cases:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append(measure(case, Path(folder), whole, args.rounds, args.tokens, args.layers))
        gc.collect()
        print(table(rows, torch_memory), flush=True)
        if not args.layers:
            save("graphs", [{"what": "torch", "memory": torch_memory}, *rows])


if __name__ == "__main__":
    main()
