"""The 2.4B model with random weights, for what does not depend on their values."""

import torch
from jina_vlm import JinaVLMConfig, JinaVLMForConditionalGeneration
from torch import nn
from transformers import AutoModelForCausalLM, initialization

from jina_vlm_tools.files import ROOT, TINY


@torch.no_grad()
def fill(module: nn.Module, scale: float = 0.02) -> None:
    """Noise for all parameters, the same again and again: drawing each number would take minutes. (Zeros would not do:
    pages that are never written are all one page, which is read faster than memory.) No two parameters are alike:
    engines would hold, and read, what they have in common once."""
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(scale)
    for index, parameter in enumerate(module.parameters()):
        flat, shifted = parameter.view(-1), noise.roll(1009 * index)
        for start in range(0, len(flat), len(noise)):
            part = flat[start : start + len(noise)]
            part.copy_(shifted[: len(part)])


def build(make, dtype: torch.dtype, device: str) -> nn.Module:
    """A module without its own initialization, filled with noise."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with initialization.no_init_weights():
            module = make()
    finally:
        torch.set_default_dtype(default)
    fill(module)
    return module.to(device).eval()


def small_tokenizers_config() -> JinaVLMConfig:
    """The 2.4B model's, with the image tokens of [`TINY`]'s processor: there is no released tokenizer here."""
    small = JinaVLMConfig.from_pretrained(TINY)
    return JinaVLMConfig.from_pretrained(
        ROOT, image_token_id=small.image_token_id, structural_token_ids=small.structural_token_ids
    )


def jina_vlm(dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> JinaVLMForConditionalGeneration:
    return build(lambda: JinaVLMForConditionalGeneration(small_tokenizers_config()), dtype, device)


def text_model(model: JinaVLMForConditionalGeneration) -> nn.Module:
    """The library's Qwen3, with this model's own weights: not one more byte."""
    with torch.device("meta"):
        alone = AutoModelForCausalLM.from_config(model.config.text_config)
    alone.model, alone.lm_head = model.model.language_model, model.lm_head
    return alone.eval()
