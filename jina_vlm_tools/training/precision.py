"""Whether bfloat16 makes a training faster on a CPU."""

import torch


INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")


def cpu_multiplies_in_bf16() -> bool:
    """Whether this CPU has instructions for it. One that has none takes several times as long as in float32. Of older
    releases of torch, which do not tell, it is assumed."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in INSTRUCTIONS)
