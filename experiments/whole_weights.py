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
        module (`nn.Module`): With adapters of PEFT, whose scale is 1; its layers are in the order of their use.
    """

    def __init__(self, module: nn.Module):
        self.layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
        self.weights = [layer.get_base_layer().weight for layer in self.layers]
        self.before = [weight.detach().clone() for weight in self.weights]
        for layer, weight in zip(self.layers, self.weights, strict=True):
            layer.enable_adapters(False)
            nn.init.orthogonal_(weight.requires_grad_(True))

    @torch.no_grad()
    def to_adapters(self, uses: list[Callable[[], object]]) -> None:
        """Give the base's weights back, with adapters that make nearly what was learned: layer by layer, each of what
        it is given once those before it are adapters, so that it makes up for some of what these lose.

        Args:
            uses: Each runs the module, on the same inputs whenever it is called.
        """
        learned = [weight.clone() for weight in self.weights]
        for number, layer in enumerate(self.layers):
            given = wanted = 0.0
            for use in uses:
                self._adapt(0, learned)
                then = _given_to(layer, use)
                self._adapt(number, learned)
                now = _given_to(layer, use)
                given, wanted = given + now.T @ now, wanted + then.T @ now
            mean = given.diagonal().mean()
            least = LEAST * torch.eye(len(given))
            given, wanted = given / mean + least, wanted / mean + least
            nearest = learned[number].double() @ torch.linalg.solve(given, wanted, left=False)
            _fit(layer, nearest - self.before[number], torch.linalg.cholesky(given))
        self._adapt(len(self.layers), learned)

    def _adapt(self, number: int, learned: list[torch.Tensor]) -> None:
        """Use adapters of the first `number` layers, and what was learned of the others."""
        for index, (layer, weight) in enumerate(zip(self.layers, self.weights, strict=True)):
            weight.copy_(self.before[index] if index < number else learned[index])
            layer.enable_adapters(index < number)


def _given_to(layer: nn.Module, use: Callable[[], object]) -> torch.Tensor:
    """What a layer is given [tokens, inputs] when its module is in use."""
    given = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].flatten(0, -2).double()))
    use()
    hook.remove()
    return torch.cat(given)


def _fit(layer: LoraLayer, change: torch.Tensor, root: torch.Tensor) -> None:
    """Make of a layer's adapter what comes nearest to a change of its weight, of all of its rank.

    Args:
        root: Cholesky's, of the second moments [inputs, inputs] of what the layer is given.
    """
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    left, sizes, right = torch.linalg.svd(change @ root, full_matrices=False)
    sizes = sizes[: len(down)].sqrt()
    right = torch.linalg.solve_triangular(root, right[: len(down)], upper=False, left=False)
    up.copy_(left[:, : len(down)] * sizes)
    down.copy_(sizes[:, None] * right)
