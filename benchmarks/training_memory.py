"""What training the 2.4B model takes of one GPU, counted: `python -m benchmarks.training_memory`.

Nothing is computed: the model stands on the meta device. Counted are

- weights: in bfloat16 beside adapters, else in float32;
- what is trained: gradients and Adam's two moments in float32, and adapters themselves;
- kept: the input of each block, with gradient checkpointing, and all of the block that keeps most, as torch keeps it;
- logits, in bfloat16, and in float32 with their softmax and gradient: of all tokens, or in TRL of the answer's alone;
- cache: of the answers that GRPO samples at once.

Not counted are fragments of memory, kernels' own and what images take before the tower: some GB. Operations are those
of a forward pass, three times for adapters (forward, again for checkpointing, backward), four times for all weights;
an answer that is sampled costs one pass more.

A sample is an image of 900 x 640 pixels and 300 tokens of text, of which 100 are its answer.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMImageProcessor
from jina_vlm.tiling_jina_vlm import count_tokens
from torch.autograd.graph import saved_tensors_hooks

from jina_vlm_tools import markdown
from jina_vlm_tools.training.lora import add_adapters
from jina_vlm_tools.training.stages import LoraSettings

from .efficiency import flops, meta_model


GB, SIZE, TEXT, ANSWER = 1e9, (640, 900), 300, 100
OF_LOGITS = 2 + 3 * 4  # bytes: in bfloat16; in float32, their softmax and their gradient


@dataclass(frozen=True)
class Kind:
    """`rows` go through the model at a time; `sampled` are the answers that are sampled together."""

    name: str
    rows: int
    max_tiles: int
    parts: tuple[str, ...] | None = None  # with adapters
    is_trl: bool = False
    sampled: int = 0


KINDS = (
    Kind("`finetune_lora`, 2 samples at a time", 2, 6, ("encoder", "connector", "decoder")),
    Kind("TRL's SFT, the same adapters, 4 samples", 4, 6, ("encoder", "connector", "decoder"), is_trl=True),
    Kind("TRL's DPO, the same adapters, 2 pairs", 4, 6, ("encoder", "connector", "decoder"), is_trl=True),
    Kind("`grpo_lora`, 8 of 64 answers at a time", 8, 4, ("connector", "decoder"), is_trl=True, sampled=64),
    Kind("All weights, 1 sample at a time", 1, 6),
)


def kept(block: torch.nn.Module, run: Callable) -> int:
    """Bytes that torch keeps of a block for its backward pass, but for parameters."""
    parameters = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(tensor.untyped_storage().nbytes() for key, tensor in storages.items() if key not in parameters)


def count(model: JinaVLMForConditionalGeneration, kind: Kind) -> dict[str, float]:
    """Bytes of each part, and operations for each row."""
    vision, text = model.config.vision_config, model.config.text_config
    processor = JinaVLMImageProcessor(max_tiles=kind.max_tiles)
    rows, columns = processor.get_tiling(*SIZE)[1]
    tiles = 1 + rows * columns
    tokens = count_tokens(rows, columns, processor.tokens_per_side, processor.token_overlap) + TEXT
    patches = (vision.image_size // vision.patch_size) ** 2
    with torch.device("meta"):
        pixels = torch.empty(tiles, 3, vision.image_size, vision.image_size, dtype=torch.bfloat16)
        seen = torch.empty(kind.rows * tiles, patches, vision.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        read = torch.empty(kind.rows, tokens, text.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        places = torch.arange(tokens)[None]
    tower, decoder = model.model.vision_model, model.model.language_model
    rotary = decoder.rotary_emb(read, places)
    blocks = (
        kept(tower.tower.encoder.layers[0], lambda: tower.tower.encoder.layers[0](seen, None)),
        kept(decoder.layers[0], lambda: decoder.layers[0](read, position_embeddings=rotary)),
    )
    inputs = [
        len(layers) * hidden.numel() * hidden.element_size()
        for layers, hidden in ((tower.tower.encoder.layers, seen), (decoder.layers, read))
    ]
    with torch.inference_mode():
        answered = flops(lambda: model.lm_head(decoder(inputs_embeds=read[:1].detach())[0]))
        forward = flops(lambda: tower(pixels)) + answered
    trained = parameters = sum(parameter.numel() for parameter in model.parameters())
    if kind.parts:
        adapted = add_adapters(meta_model(2), LoraSettings(16, 32, parts=list(kind.parts)))
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    of_token = 2 * text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_dim
    return {
        "weights": parameters * (2 if kind.parts else 4),
        "trained": trained * (16 if kind.parts else 12),
        "kept": sum(inputs) + max(blocks),
        "logits": kind.rows * (ANSWER if kind.is_trl else tokens) * text.vocab_size * OF_LOGITS,
        "cache": kind.sampled * tokens * of_token,
        "operations": forward * ((3 if kind.parts else 4) + bool(kind.sampled)),
    }


def table(counted: dict[str, dict[str, float]]) -> str:
    head = ["Training", "Weights", "Trained", "Kept", "Logits", "Cache", "Together, GB", "10^12 operations a row"]
    lines = []
    for name, parts in counted.items():
        sizes = [parts[part] / GB for part in ("weights", "trained", "kept", "logits", "cache")]
        shown = [f"{size:.1f}" if size else "-" for size in (*sizes, sum(sizes))]
        lines.append([name, *shown, f"{parts['operations'] / 1e12:.0f}"])
    return markdown.table(head, lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    model = meta_model(2).train()
    print(table({kind.name: count(model, kind) for kind in KINDS}))


if __name__ == "__main__":
    main()
