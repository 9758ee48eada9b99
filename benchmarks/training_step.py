"""A training step beside the sum of the library's parts: `python -m benchmarks.training_step`.

On a CPU of the small model, in float32: forwards and backwards of a batch of two images, against the library's SigLIP
and Qwen3 of the same sizes with the same tiles and tokens, one after the other; what the connector and putting the
parts together take is the rest. With `--device cuda` of the 2.4B model in bfloat16, with gradient checkpointing:
tokens a second, memory, and the share of the card's rate of products, which is measured.
"""

import torch
from jina_vlm import JinaVLMConfig, JinaVLMForConditionalGeneration, JinaVLMProcessor
from jina_vlm.compatibility_jina_vlm import CHECKPOINTING
from transformers import AutoModel, AutoModelForCausalLM

from jina_vlm_tools import markdown
from jina_vlm_tools.files import TINY

from . import full_model
from .batches import conversations
from .efficiency import flops
from .results import arguments, save
from .side_by_side import medians, ratio, take_turns, together


def batch(processor: JinaVLMProcessor, number: int) -> dict[str, torch.Tensor]:
    """So many questions about images, every token of which is a label."""
    inputs = processor.apply_chat_template(
        conversations(number),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        add_generation_prompt=True,
    )
    return {**inputs, "labels": inputs["input_ids"]}


def step(model, **inputs) -> None:
    """Forwards and backwards."""
    output = model(**inputs)
    loss = output.loss if "loss" in output else output.last_hidden_state.float().pow(2).mean()
    loss.backward()
    model.zero_grad(set_to_none=True)


def small(rounds: int) -> dict:
    processor, config = JinaVLMProcessor.from_pretrained(TINY), JinaVLMConfig.from_pretrained(TINY)
    inputs = batch(processor, 2)
    ours = JinaVLMForConditionalGeneration(config).train()
    tower, text = (
        AutoModel.from_config(config.vision_config).train(),
        AutoModelForCausalLM.from_config(config.text_config).train(),
    )
    text_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    seconds = take_turns(
        {
            "ours": lambda: step(ours, **inputs),
            "tower": lambda: step(tower, pixel_values=inputs["pixel_values"]),
            "text": lambda: step(text, **text_inputs),
        },
        rounds,
    )
    seconds["parts"] = together(seconds, ("tower", "text"))
    return {
        "what": "small model, float32",
        "tiles": len(inputs["pixel_values"]),
        "tokens": inputs["input_ids"].numel(),
        "seconds": medians(seconds),
        "to_parts": ratio(seconds, "ours", "parts"),
    }


def measured_rate(side: int = 8192) -> float:
    """Operations a second of a large product in bfloat16."""
    left, right = torch.randn(2, side, side, dtype=torch.bfloat16, device="cuda")
    seconds = medians(take_turns({"product": lambda: left @ right}, 10, "cuda"))["product"]
    return 2 * side**3 / seconds


def large(rounds: int) -> dict:
    processor = JinaVLMProcessor.from_pretrained(TINY)
    inputs = {name: value.to("cuda") for name, value in batch(processor, 4).items()}
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    model = full_model.jina_vlm(device="cuda").train()
    getattr(model, f"{CHECKPOINTING}_enable")()
    torch.cuda.reset_peak_memory_stats()
    operations = flops(lambda: step(model, **inputs))
    seconds = medians(take_turns({"ours": lambda: step(model, **inputs)}, rounds, "cuda"))
    tokens = inputs["input_ids"].numel()
    return {
        "what": "2.4B, bfloat16, gradient checkpointing",
        "tiles": len(inputs["pixel_values"]),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds["ours"],
        "memory": torch.cuda.max_memory_allocated(),
        "share_of_rate": operations / seconds["ours"] / measured_rate(),
    }


def table(rows: list[dict]) -> str:
    head = [
        "A step of",
        "Tiles",
        "Tokens",
        "Ours, s",
        "Sum of the library's SigLIP and Qwen3, s",
        "Ratio",
        "Tokens a second",
        "Memory, GB",
        "Share of the rate",
    ]
    return markdown.table(
        head,
        [
            [
                row["what"],
                str(row["tiles"]),
                f"{row['tokens']:,}",
                f"{row['seconds']['ours']:.2f}",
                f"{row['seconds']['parts']:.2f}" if "to_parts" in row else "",
                f"**{row['to_parts']:.2f}**" if "to_parts" in row else "",
                f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "",
                f"{row['memory'] / 1e9:.1f}" if "memory" in row else "",
                f"{row['share_of_rate']:.0%}" if "share_of_rate" in row else "",
            ]
            for row in rows
        ],
    )


def main() -> None:
    args = arguments(__doc__, rounds=5).parse_args()
    rows = [large(args.rounds) if args.device == "cuda" else small(args.rounds)]
    print(table(rows))
    save("training_step", rows, args.device)


if __name__ == "__main__":
    main()
