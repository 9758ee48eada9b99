"""The library's Trainer, for jina-vlm: batches by a plan, a learning rate for each part, answers during evaluation."""

import functools
import math

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from .answers import ask_all
from .mixture import MixtureDataset, Plan
from .muon import OTHERS, Muon, hidden_matrices
from .stages import PARTS, EvaluationSettings, PartSettings


PREFIXES = {"vision_model.": "encoder", "connector.": "connector"}  # all else is the decoder's


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name, also inside PEFT's and DDP's wrappers."""
    return next((part for prefix, part in PREFIXES.items() if f".{prefix}" in f".{name}"), "decoder")


def freeze(model: nn.Module, parts: dict[str, PartSettings]) -> None:
    """Parts without a learning rate stay as they are."""
    for name, parameter in model.named_parameters():
        if not parts[part_of(name)].learning_rate:
            parameter.requires_grad_(False)


def see_blank_images(model: nn.Module) -> None:
    """
    Let a batch without images pass a blank one through tower and connector while training, and make nothing of it.

    Else these would have no gradients on one process and some on another: DDP and FSDP wait for each other for ever.
    So they have zeros.
    """

    def add_blank(inner: nn.Module, args: tuple, kwargs: dict):
        if not inner.training or any(
            kwargs.get(name) is not None for name in ("pixel_values", "mm_encoder_outputs", "cache", "past_key_values")
        ):
            return None
        side, channels = inner.config.vision_config.image_size, inner.config.vision_config.num_channels
        parameter = next(inner.parameters())
        pixels = parameter.new_zeros(2, channels, side, side, requires_grad=True)
        positions = torch.tensor([[-1, -1, 1, 1], [0, 0, 1, 1]], device=parameter.device)
        outputs = inner.get_image_features(pixels, positions, return_dict=True)
        outputs.pooler_output = [features[:0] for features in outputs.pooler_output]
        return args, {**kwargs, "mm_encoder_outputs": {"image": outputs}}

    model.model.register_forward_pre_hook(add_blank, with_kwargs=True)


def cosine(step: int, part: PartSettings, steps: int) -> float:
    """The share of the peak that a learning rate has at a step."""
    if step < part.warmup_steps:
        return step / part.warmup_steps
    share = (step - part.warmup_steps) / max(1, steps - part.warmup_steps)
    return part.final_share + (1 - part.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class ByParts(Trainer):
    """A trainer with a learning rate for each part. In front of one of TRL's, it makes that one such a trainer.

    Args:
        parts (`dict[str, PartSettings]`): How each part is trained.
        muon (`bool`): Train by [`Muon`] rather than as `TrainingArguments.optim` says.
        kwargs: Of the trainer.
    """

    def __init__(self, *args, parts: dict[str, PartSettings], muon: bool = False, **kwargs):
        self.parts, self.muon = parts, muon
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        model = self.model if model is None else model
        if self.optimizer is None:
            if self.muon:
                kind, kwargs, decayed = Muon, {}, hidden_matrices(model)
            else:
                kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
                kwargs.pop("lr")
                names = set(self.get_decay_parameter_names(model))
                decayed = {parameter for name, parameter in model.named_parameters() if name in names}
            groups = {(part, decays): [] for part in PARTS for decays in (True, False)}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    groups[part_of(name), parameter in decayed].append(parameter)
            self.optimizer = kind(
                [
                    {
                        "params": parameters,
                        "lr": self.parts[part].learning_rate * (OTHERS if self.muon and not decays else 1),
                        "weight_decay": self.args.weight_decay if decays else 0.0,
                        "part": part,
                    }
                    | ({"matrices": decays} if self.muon else {})
                    for (part, decays), parameters in groups.items()
                    if parameters
                ],
                **kwargs,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            shapes = [
                functools.partial(cosine, part=self.parts[group["part"]], steps=num_training_steps)
                for group in optimizer.param_groups
            ]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shapes)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs:  # of the first group alone
            del logs["learning_rate"]
            logs |= {f"learning_rate_{group['part']}": group["lr"] for group in self.optimizer.param_groups}
        super().log(logs, start_time)


class JinaVLMTrainer(ByParts):
    """
    Args:
        plan (`Plan`): The batches. All processes have the same, and each takes its own of it.
        evaluation (`EvaluationSettings`, *optional*): How `eval_dataset`, samples as chats, is asked.
        kwargs: Of [`ByParts`] and `Trainer`.
    """

    def __init__(self, *args, plan: Plan, evaluation: EvaluationSettings | None = None, **kwargs):
        self.plan, self.evaluation = plan, evaluation
        super().__init__(
            *args, train_dataset=MixtureDataset(plan.sources, plan.steps * plan.global_batch_size), **kwargs
        )

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.plan,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)  # deals the batches out

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # In evaluation the library would weigh a batch by its share of what all processes evaluate at that moment, so
        # that the number depended on how many there are.
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch if model.training else None)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.evaluation:
            right = ask_all(self.model, self.processing_class, self.eval_dataset, self.evaluation, self.accelerator)
            output.metrics[f"{metric_key_prefix}_accuracy"] = right
        return output
