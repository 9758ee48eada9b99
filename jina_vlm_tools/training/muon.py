"""An optimizer for small models from nothing: Muon for matrices, AdamW for the rest.

Muon (Keller Jordan, 2024) makes the momentum of a matrix nearly orthogonal before it takes a step, so that all
directions are learned at the same speed. In one short trial on this model it was ahead of AdamW alone. torch has a
`Muon` too, which takes matrices alone and computes in bfloat16, slow on most CPUs.
"""

import torch
from torch import nn


OTHERS = 0.5  # of a matrix's learning rate: what AdamW's parameters have


class Muon(torch.optim.Optimizer):
    """
    Args:
        groups (`list[dict]`): As from [`muon_groups`]. Those with `matrices=True` are trained by Muon.
        momentum (`float`): Of Muon.
        betas (`tuple[float, float]`), eps (`float`): Of AdamW.
    """

    def __init__(self, groups: list[dict], momentum: float = 0.95, betas: tuple = (0.9, 0.98), eps: float = 1e-8):
        super().__init__(groups, {"momentum": momentum, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._muon_update if group["matrices"] else self._adam_update
                parameter.add_(update(parameter, group), alpha=-group["lr"])

    def _muon_update(self, parameter: torch.Tensor, group: dict) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
        update = orthogonalise(parameter.grad + group["momentum"] * state["momentum"])
        return update * 0.2 * max(parameter.shape) ** 0.5  # elements as large as AdamW's typically are

    def _adam_update(self, parameter: torch.Tensor, group: dict) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        state["mean"].lerp_(parameter.grad, 1 - group["betas"][0])
        state["square"].lerp_(parameter.grad**2, 1 - group["betas"][1])
        mean, square = (
            state[name] / (1 - beta ** state["step"])
            for name, beta in zip(("mean", "square"), group["betas"], strict=True)
        )
        return mean / (square.sqrt() + group["eps"])


def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """A matrix of the same singular vectors whose singular values are all near 1, by Newton-Schulz iteration with
    coefficients that hurry small ones up (and leave all between about 0.7 and 1.2)."""
    result = matrix / (matrix.norm() + 1e-7)
    wide = result if matrix.shape[0] <= matrix.shape[1] else result.T
    for _ in range(steps):
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The trained weights of all hidden linear layers; not embeddings, heads, convolutions, norms and biases."""
    return {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and not name.endswith("head")
    }


def muon_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict]:
    """Hidden matrices, decayed; and all else, at `OTHERS` of their learning rate."""
    hidden = hidden_matrices(model)
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in hidden]
    return [
        {
            "params": [parameter for parameter in model.parameters() if parameter in hidden],
            "lr": learning_rate,
            "weight_decay": weight_decay,
            "matrices": True,
        },
        {"params": others, "lr": OTHERS * learning_rate, "weight_decay": 0.0, "matrices": False},
    ]
