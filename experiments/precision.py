"""What trainings compute in: bfloat16, but for CPUs that have no instructions for it."""

import torch

from jina_vlm_tools.training.precision import cpu_multiplies_in_bf16


IN_BF16 = torch.accelerator.is_available() or cpu_multiplies_in_bf16()
ATTENTION = "eager" if IN_BF16 else "sdpa"  # each the faster one on a CPU in this precision: eager by a third


def reduced_precision() -> torch.autocast:
    """Of what is computed on a CPU."""
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_in_bf16())
