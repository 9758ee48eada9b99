"""A stage of training, as a YAML file: `recipes/*.yaml`."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

from . import settings
from .mixture import MixtureSettings, read_mixture
from .settings import SettingsError


PARTS = ("encoder", "connector", "decoder")


@dataclasses.dataclass
class PartSettings:
    """How one part of the model is trained: the peak of its learning rate, 0 for a part that stays as it is, and the
    steps that lead up to it. From there it falls as a cosine to `final_share` of the peak."""

    learning_rate: float
    warmup_steps: int = 0
    final_share: float = 0.0


@dataclasses.dataclass
class LoraSettings:
    """Adapters of PEFT, beside the linear layers of these parts, are trained in place of the parts themselves."""

    rank: int
    alpha: int
    dropout: float = 0.0
    parts: list[Literal["encoder", "connector", "decoder"]] = dataclasses.field(default_factory=lambda: list(PARTS))


@dataclasses.dataclass
class EvaluationSettings:
    """Questions asked every so many steps, before the first and after the last. `path` is a file as a mixture's. An
    answer is right if its words are the expected ones."""

    path: str
    every: int
    samples: int
    max_new_tokens: int
    batch_size: int = 8


@dataclasses.dataclass
class RewardSettings:
    """A reward of [`rewards`], by its name, and its weight in the sum. `pattern` is a regular expression that the
    answer must be, for the reward of that name."""

    name: Literal["exact", "number", "words", "letters", "pattern"]
    weight: float = 1.0
    pattern: str | None = None


@dataclasses.dataclass
class GrpoSettings:
    """Reinforcement learning (GRPO): a sample's last answer is not learned, but what rewards compare answers with
    that the model gives itself, `answers` to each question. `kl` weighs the distance from the model at the start."""

    rewards: list[RewardSettings]
    answers: int
    max_new_tokens: int
    temperature: float = 1.0
    kl: float = 0.0


@dataclasses.dataclass
class Stage:
    """
    Args:
        model (`str`): A folder, relative to the YAML file's, or a repository of the Hub.
        mixture (`str`): A YAML file, relative to this one.
        steps (`int`): Optimizer steps.
        global_batch_size (`int`): Samples of one step, over all processes; answers where there is `grpo`.
        batch_size (`int`): Samples, or answers, of one process at a time.
        encoder, connector, decoder (`PartSettings`): How each part is trained.
        lora (`LoraSettings`, *optional*): Train adapters instead.
        grpo (`GrpoSettings`, *optional*): Learn from rewards rather than from answers.
        evaluation (`EvaluationSettings`, *optional*): Questions asked during training.
        max_length (`int`, *optional*): The longest sample, in tokens; longer ones count as bad, but that documents
            (layout `text`) are cut.
        max_tiles (`int`, *optional*): Of an image, in the place of the checkpoint's own setting.
        optimizer (`str`): "muon" for small models from nothing: learning rates are those of matrices, see `muon`.
        beta2, eps (`float`): Of AdamW, whose first beta is 0.9; "muon" has its own.
        precision (`str`): "bf16": weights are kept in float32, or in bfloat16 beside adapters, and computed with in
            bfloat16.
        workers (`int`): Processes beside each that load samples, and that measure them before.
        save_every (`int`): Steps between checkpoints that a run can go on from; as many as steps: at the end only.
        fsdp (`bool`): Shard weights, gradients and optimizer over the processes (FSDP2), rather than copy them to
            each.
    """

    model: str
    mixture: str
    steps: int
    global_batch_size: int
    batch_size: int
    encoder: PartSettings
    connector: PartSettings
    decoder: PartSettings
    lora: LoraSettings | None = None
    grpo: GrpoSettings | None = None
    evaluation: EvaluationSettings | None = None
    max_length: int | None = None
    max_tiles: int | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = True
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8
    workers: int = 0
    log_every: int = 10
    save_every: int = 1000
    fsdp: bool = False
    seed: int = 0

    @property
    def parts(self) -> dict[str, PartSettings]:
        return {name: getattr(self, name) for name in PARTS}


def read_stage(file: str | Path, processes: int = 1) -> tuple[Stage, MixtureSettings]:
    """A stage and its mixture, checked.

    Raises:
        SettingsError: names the file, the key and the value that cannot be.
    """
    stage = settings.read(file, Stage)
    for name in ("steps", "global_batch_size", "batch_size", "log_every", "save_every"):
        if getattr(stage, name) < 1:
            raise SettingsError(file, name, getattr(stage, name), "expected at least 1.")
    settings.check_least(file, stage, ("workers", "seed", "weight_decay", "max_grad_norm"), 0)
    settings.check_least(file, stage, ("max_length", "max_tiles"), 1)
    if stage.lora and not (stage.lora.rank >= 1 and stage.lora.alpha > 0 and 0 <= stage.lora.dropout < 1):
        raise SettingsError(
            file,
            "lora",
            dataclasses.asdict(stage.lora),
            "expected a `rank` of 1 or more, an `alpha` above 0, and a `dropout` from 0 to below 1.",
        )
    if stage.global_batch_size % (stage.batch_size * processes):
        raise SettingsError(
            file,
            "global_batch_size",
            stage.global_batch_size,
            f"expected a multiple of `batch_size` ({stage.batch_size}) times the number of processes ({processes}).",
        )
    for name, part in stage.parts.items():
        if part.learning_rate < 0 or not 0 <= part.final_share <= 1:
            raise SettingsError(
                file, name, dataclasses.asdict(part), "expected a learning rate from 0, and a share from 0 to 1."
            )
        if not 0 <= part.warmup_steps <= stage.steps:
            raise SettingsError(
                file, f"{name}.warmup_steps", part.warmup_steps, f"expected 0 to `steps` ({stage.steps})."
            )
    trained = stage.lora.parts if stage.lora else PARTS
    if not any(stage.parts[name].learning_rate for name in trained):
        raise SettingsError(
            file, "encoder, connector, decoder", 0.0, "no part that is trained has a learning rate above 0."
        )
    if not 0 <= stage.beta2 < 1:
        raise SettingsError(file, "beta2", stage.beta2, "expected a number from 0 to below 1.")
    if not stage.eps > 0:
        raise SettingsError(file, "eps", stage.eps, "expected a number above 0.")
    if stage.optimizer == "muon":
        for name in ("beta2", "eps"):
            if getattr(stage, name) != getattr(Stage, name):
                raise SettingsError(file, name, getattr(stage, name), "the optimizer muon has its own. Leave it out.")
    if stage.grpo:
        check_grpo(file, stage, stage.grpo)
    if stage.evaluation:
        counts = ("every", "samples", "max_new_tokens", "batch_size")
        settings.check_least(file, stage.evaluation, counts, 1, prefix="evaluation.")
        if not beside(file, stage.evaluation.path).is_file():
            raise SettingsError(file, "evaluation.path", stage.evaluation.path, "no file has this name.")
    mixture_file = beside(file, stage.mixture)
    if not mixture_file.is_file():
        raise SettingsError(file, "mixture", stage.mixture, "no file has this name.")
    mixture = read_mixture(mixture_file)
    for index, source in enumerate(mixture.sources):
        if stage.grpo and source.streaming:
            raise SettingsError(
                mixture_file,
                f"sources[{index}].streaming",
                True,
                "with `grpo` each question is read for each of its answers, which a stream does not allow.",
            )
    return stage, mixture


def check_grpo(file: str | Path, stage: Stage, grpo: GrpoSettings) -> None:
    """
    Raises:
        SettingsError: names the file, the key and the value that cannot be.
    """
    settings.check_least(file, grpo, ("answers",), 2, prefix="grpo.")
    settings.check_least(file, grpo, ("max_new_tokens",), 1, prefix="grpo.")
    settings.check_least(file, grpo, ("kl",), 0, prefix="grpo.")
    if not grpo.temperature > 0:
        raise SettingsError(file, "grpo.temperature", grpo.temperature, "expected a number above 0.")
    if stage.global_batch_size % grpo.answers:
        raise SettingsError(
            file,
            "global_batch_size",
            stage.global_batch_size,
            f"expected a multiple of `grpo.answers` ({grpo.answers}): a step has all answers of its questions.",
        )
    if not grpo.rewards:
        raise SettingsError(file, "grpo.rewards", [], "expected at least one.")
    for index, reward in enumerate(grpo.rewards):
        key = f"grpo.rewards[{index}]"
        if (reward.name == "pattern") != (reward.pattern is not None):
            raise SettingsError(
                file, f"{key}.pattern", reward.pattern, "expected a text for the reward pattern, and for no other."
            )
        if not reward.weight > 0:
            raise SettingsError(file, f"{key}.weight", reward.weight, "expected a number above 0.")
        if reward.pattern == "":
            raise SettingsError(file, f"{key}.pattern", "", "it matches silence alone.")
        try:
            re.compile(reward.pattern or "")
        except re.error as error:
            raise SettingsError(
                file, f"{key}.pattern", reward.pattern, f"it is no regular expression: {error}"
            ) from error
    names = [reward.name for reward in grpo.rewards]
    if len({*names}) < len(names):
        raise SettingsError(file, "grpo.rewards", names, "expected each reward once.")


def beside(file: str | Path, name: str) -> Path:
    """A file or folder that a YAML file names: beside it, else in the working directory."""
    nearby = Path(file).parent / name
    return nearby if nearby.exists() else Path(name)
