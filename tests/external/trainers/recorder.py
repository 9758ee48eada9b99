"""An external plug-in of ms-swift, beside the example's: writes what the model is given and what comes of it to the
folder $RECORD, a file for each batch; and has a reward that tells answers apart."""

import functools
import os
from itertools import count
from pathlib import Path

import jina_vlm
import torch
from swift.rewards import ORM, orms
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer


numbers = count()


def keep(**record) -> None:
    torch.save(record, Path(os.environ["RECORD"]) / f"{next(numbers):04}.pt")


def record_training(forward):
    @functools.wraps(forward)
    def recorded(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        if kwargs.get("labels") is not None:
            keep(inputs={name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)})
        return outputs

    return recorded


def record_log_probabilities(method):
    @functools.wraps(method)
    def recorded(self, model, model_inputs, grpo_batch, *args, **kwargs):
        result = method(self, model, model_inputs, grpo_batch, *args, **kwargs)
        keep(
            step=self.state.global_step,
            inputs=dict(model_inputs),
            log_probabilities=result[0].detach(),
            mask=grpo_batch.completion_mask.bool(),
        )
        return result

    return recorded


class Letters(ORM):
    def __call__(self, completions: list[str], **kwargs) -> list[float]:
        return [float(sum(completion.encode()) % 7) for completion in completions]


orms["letters"] = Letters
jina_vlm.JinaVLMForConditionalGeneration.forward = record_training(jina_vlm.JinaVLMForConditionalGeneration.forward)
GRPOTrainer._get_per_token_logps_and_entropies = record_log_probabilities(
    GRPOTrainer._get_per_token_logps_and_entropies
)
