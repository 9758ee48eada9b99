"""Adapters of PEFT beside the linear layers of tower, connector and decoder."""

from peft import LoraConfig, PeftModel, get_peft_model

from .stages import LoraSettings


# The names of the linear layers of each part, as a regular expression for PEFT's `target_modules`. By the full name:
# tower, connector and decoder use some names in common.
TARGETS = {
    "encoder": (
        r"(model\.)?vision_model\.tower\.encoder\.layers\.\d+\."
        r"(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))"
    ),
    "connector": r"(model\.)?connector\.(q_proj|k_proj|v_proj|out_proj|gate_proj|up_proj|down_proj)",
    "decoder": (
        r"(model\.)?language_model\.layers\.\d+\."
        r"(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))"
    ),
}


def target_modules(parts: list[str]) -> str:
    """For a `LoraConfig`: the linear layers of these parts, which are "encoder", "connector" and "decoder"."""
    return "|".join(f"(?:{TARGETS[part]})" for part in parts)


def add_adapters(model, settings: LoraSettings) -> PeftModel:
    """The model with new adapters, which alone are trained and change nothing yet."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_modules(settings.parts),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
