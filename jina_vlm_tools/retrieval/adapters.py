"""Adapters that transformers' `load_adapter` put on a model, switched by PEFT itself.

The library's own switches (`set_adapter`, `disable_adapters`, `enable_adapters`) do the same, but refuse where they
find PEFT too old: transformers 5.24.0 asks for peft 0.22.0, newer than any release when it came out.
"""

from torch import nn


def switch(model: nn.Module, adapter: str | None) -> None:
    """Let the model compute with this adapter alone, or without any for None."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled=adapter is not None)
            if adapter is not None:
                module.set_adapter(adapter, inference_mode=True)
