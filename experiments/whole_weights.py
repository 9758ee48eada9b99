"""Layers that learn by their own weights where they have adapters, and adapters that say nearly the same.

An adapter of low rank learns slowly what is far from its base, as letters are from shapes. Random weights that learn
whole come further in as many steps; and what they came to is the base's weight and an adapter, nearly.
"""

from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


LEAST = 1e-4  # of the mean: how much a layer is at least given in any direction


class WholeWeights:
    """Start the layers of a module anew: from orthogonal weights, without adapters.

    Args:
        module (`nn.Module`): With adapters of PEFT, whose scale is 1.
    """

    def __init__(self, module: nn.Module):
        self.layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
        self.weights = [layer.get_base_layer().weight for layer in self.layers]
        self.before = [weight.detach().clone() for weight in self.weights]
        for layer, weight in zip(self.layers, self.weights, strict=True):
            layer.enable_adapters(False)
            nn.init.orthogonal_(weight.requires_grad_(True))

    @torch.no_grad()
    def to_adapters(self, use: Callable[[], object]) -> None:
        """Give the base's weights back, with the adapters that come nearest to what was learned: of their rank, those
        whose outputs are, for what the layers are given when the module is in use (`use` runs it)."""
        given = self._given(use)
        for layer, weight, before in zip(self.layers, self.weights, self.before, strict=True):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            root = torch.linalg.cholesky(given[layer])
            left, sizes, right = torch.linalg.svd((weight - before).double() @ root, full_matrices=False)
            sizes = sizes[: len(down)].sqrt()
            right = torch.linalg.solve_triangular(root, right[: len(down)], upper=False, left=False)
            up.copy_(left[:, : len(down)] * sizes)
            down.copy_(sizes[:, None] * right)
            weight.copy_(before)
            layer.enable_adapters(True)

    def _given(self, use: Callable[[], object]) -> dict[nn.Module, torch.Tensor]:
        """Of each layer, the second moments of what it is given [inputs, inputs], with a mean of 1."""
        moments = dict.fromkeys(self.layers, 0.0)

        def add(layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            states = inputs[0].flatten(0, -2).double()
            moments[layer] += states.T @ states

        hooks = [layer.register_forward_pre_hook(add) for layer in self.layers]
        use()
        for hook in hooks:
            hook.remove()
        return {layer: each / each.diagonal().mean() + LEAST * torch.eye(len(each)) for layer, each in moments.items()}
