"""Train jina-vlm as a stage says: `jina-vlm train`. The output folder holds the trained checkpoint, and under `run`
the Trainer's own, TensorBoard's files and loss curves."""

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jina_vlm
import torch
from accelerate import PartialState
from jina_vlm.compatibility_jina_vlm import CHECKPOINTING
from transformers import AutoConfig, Trainer, TrainerCallback, TrainingArguments, set_seed

from jina_vlm_tools.files import TEMPLATE

from .collator import JinaVLMCollator
from .curves import draw_curves
from .lora import add_adapters
from .mixture import MixtureSettings, Place, Plan, Source, SourceSettings, TooManyBadSamples, padding_share, shares
from .precision import cpu_multiplies_in_bf16
from .settings import SettingsError
from .stages import Stage, beside, read_stage
from .trainer import JinaVLMTrainer, freeze, see_blank_images


logger = logging.getLogger(__name__)
STAGE_FILE = "stage.json"  # beside a run's checkpoints: what it was started with


# ---------------------------------------------------------------------------------------------------------------------
# What is checked before a model is built
# ---------------------------------------------------------------------------------------------------------------------


def load_config(stage: Stage, file: Path) -> jina_vlm.JinaVLMConfig:
    """
    Raises:
        SettingsError: `model` is no checkpoint of jina-vlm.
    """
    try:
        config = AutoConfig.from_pretrained(stage.model)
    except (OSError, ValueError) as error:
        raise SettingsError(file, "model", stage.model, f"its config cannot be read: {error}") from error
    if not isinstance(config, jina_vlm.JinaVLMConfig):
        raise SettingsError(
            file, "model", stage.model, f"expected a jina-vlm, but its config is of {config.model_type!r}."
        )
    return config


def load_processor(stage: Stage, file: Path, config: jina_vlm.JinaVLMConfig) -> jina_vlm.JinaVLMProcessor:
    """
    Raises:
        SettingsError: the processor does not belong to the config.
    """
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(stage.model)
    if processor.patch_token_id != config.image_token_id:
        raise SettingsError(
            file,
            "model",
            stage.model,
            f"its tokenizer's <im_patch> is {processor.patch_token_id}, its config's {config.image_token_id}.",
        )
    if "{% generation" not in str(processor.chat_template).replace("{%-", "{%"):
        logger.warning(
            "The chat template of %s does not mark what assistants say. Training uses, and saves, this repository's "
            "chat_template.jinja, which writes the release's text.",
            stage.model,
        )
        processor.chat_template = TEMPLATE.read_text(encoding="utf-8")
    if stage.max_tiles is not None:
        processor.image_processor.max_tiles = stage.max_tiles
    return processor


def open_sources(stage: Stage, mixture: MixtureSettings, file: Path, collator: JinaVLMCollator) -> list[Source]:
    mixture_file = beside(file, stage.mixture)
    return [
        Source(source, number, mixture_file, collator, mixture.max_bad_share, workers=stage.workers)
        for number, source in enumerate(mixture.sources)
    ]


def open_evaluation(stage: Stage, file: Path, collator: JinaVLMCollator) -> list[dict] | None:
    """Samples as chats, in the file's order."""
    if stage.evaluation is None:
        return None
    settings = SourceSettings("evaluation", 1.0, "", "", "image-text", "", path=stage.evaluation.path)
    source = Source(settings, 0, file, collator, max_bad_share=0.0, limit=stage.evaluation.samples, key="evaluation")
    samples = [source.sample(Place(0, index, tokens, tiles)) for index, tokens, tiles in source.measures]
    for index, sample in enumerate(samples):
        if sample["messages"][-1]["role"] != "assistant":
            raise SettingsError(
                file,
                "evaluation.path",
                stage.evaluation.path,
                f"row {index} ends in a turn of {sample['messages'][-1]['role']}, expected the right answer there.",
            )
    return samples


def last_checkpoint(run: Path) -> str | None:
    """The last that is whole: the Trainer writes its state last."""
    whole = [state.parent for state in run.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda folder: int(folder.name.split("-")[1]))) if whole else None


def check_resumption(run: Path, stage: Stage, mixture: MixtureSettings, resume: bool, file: Path) -> str | None:
    """The checkpoint to go on from. A run goes on as it began: other settings would not give its losses."""
    started = run / STAGE_FILE
    now = {"stage": dataclasses.asdict(stage), "mixture": dataclasses.asdict(mixture)}
    last = last_checkpoint(run)
    if not resume:
        if last:
            raise ValueError(
                f"{run} holds a run already. Go on with it by --resume, or name another folder by --output."
            )
        if weights := sorted(path.name for path in run.parent.glob("*.safetensors")):
            raise ValueError(
                f"{run.parent} holds weights already ({weights[0]}), which would be replaced. Name another folder by "
                "--output."
            )
        return None
    if not last:
        raise ValueError(f"{run} holds no checkpoint to go on from. Leave --resume out.")
    before = json.loads(started.read_text(encoding="utf-8"))
    for part in now:
        for key, value in now[part].items():
            if value != before[part].get(key):
                raise SettingsError(
                    file, f"{part}.{key}", value, f"the run in {run} began with {before[part].get(key)!r}."
                )
    return last


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def training_arguments(stage: Stage, run: Path, processes: int) -> TrainingArguments:
    """The Trainer's, or TRL's where the stage has `grpo`."""
    kind, more = TrainingArguments, {}
    if stage.grpo:
        from trl import GRPOConfig  # its import takes seconds

        from .grpo import grpo_arguments

        kind, more = GRPOConfig, grpo_arguments(stage.grpo)
    return kind(
        **shared_arguments(stage, run, processes),
        gradient_accumulation_steps=stage.global_batch_size // (stage.batch_size * processes),
        learning_rate=max(
            part.learning_rate for part in stage.parts.values()
        ),  # each part's own is set in the trainer
        adam_beta2=stage.beta2,
        adam_epsilon=stage.eps,
        eval_strategy="steps" if stage.evaluation else "no",
        eval_steps=stage.evaluation.every if stage.evaluation else None,
        eval_on_start=stage.evaluation is not None,
        per_device_eval_batch_size=1,  # losses are averaged over batches: so each sample counts alike
        prediction_loss_only=True,
        label_names=["labels"],
        ddp_find_unused_parameters=False,  # see `see_blank_images`
        fsdp=stage.fsdp or None,
        fsdp_config=FSDP if stage.fsdp else None,
        **more,
    )


def shared_arguments(stage: Any, run: Path, processes: int) -> dict[str, Any]:
    """The Trainer's that all of our trainings have, by a [`Stage`] or by another that has these settings."""
    on_cpu = not torch.accelerator.is_available()
    if stage.precision == "bf16" and on_cpu and not cpu_multiplies_in_bf16():
        logger.warning(
            "This CPU has no instructions for bfloat16, and takes several times as long in it as in float32. Unless "
            "memory is short, set `precision: fp32`."
        )
    return {
        "output_dir": str(run),
        "max_steps": stage.steps,
        "per_device_train_batch_size": stage.batch_size,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "bf16": stage.precision == "bf16",
        "use_cpu": on_cpu,
        CHECKPOINTING: stage.gradient_checkpointing,
        "logging_steps": stage.log_every,
        "logging_first_step": True,
        "save_steps": stage.save_every,
        "save_total_limit": 2,
        "remove_unused_columns": False,
        "dataloader_num_workers": stage.workers,
        "dataloader_pin_memory": not on_cpu,
        "ddp_backend": "gloo" if on_cpu and processes > 1 else None,
        "report_to": ["tensorboard"],
        "seed": stage.seed,
    }


# FSDP2. Blocks are gathered one by one; all that lies outside of them (embedding, connector, head) with the whole.
FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["SiglipEncoderLayer", "Qwen3DecoderLayer"],
    "reshard_after_forward": True,
    "state_dict_type": "FULL_STATE_DICT",
}


class Curves(TrainerCallback):
    """Draws the curves whenever a checkpoint is written, and at the end."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw_curves(state.log_history, Path(args.output_dir) / "curves.png")

    on_train_end = on_save


def make_trainer(stage: Stage, mixture: MixtureSettings, file: Path, run: Path, processes: int) -> Trainer:
    """All that a stage needs, checked before the model is built."""
    set_seed(stage.seed)
    config = load_config(stage, file)
    processor = load_processor(stage, file, config)
    collator = make_collator(stage, processor)
    plan = make_plan(stage, mixture, file, collator)
    questions = open_evaluation(stage, file, collator)

    in_bf16 = stage.precision == "bf16" and stage.lora is not None
    model = jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(
        stage.model, dtype=torch.bfloat16 if in_bf16 else torch.float32
    )
    see_blank_images(model)
    if stage.lora:
        model = add_adapters(model, stage.lora)
    freeze(model, stage.parts)
    kwargs = {
        "args": training_arguments(stage, run, processes),
        "eval_dataset": questions,
        "processing_class": processor,
        "callbacks": [Curves()],
        "plan": plan,
        "parts": stage.parts,
        "evaluation": stage.evaluation,
        "muon": stage.optimizer == "muon",
    }
    if stage.grpo:
        from .grpo import JinaVLMGRPOTrainer

        return JinaVLMGRPOTrainer(model, grpo=stage.grpo, **kwargs)
    return JinaVLMTrainer(model, data_collator=collator, **kwargs)


def make_collator(stage: Stage, processor: jina_vlm.JinaVLMProcessor) -> JinaVLMCollator:
    if stage.grpo:
        from .grpo import QuestionCollator

        return QuestionCollator(processor, stage.max_length, stage.grpo)
    return JinaVLMCollator(processor, stage.max_length)


def make_plan(stage: Stage, mixture: MixtureSettings, file: Path, collator: JinaVLMCollator) -> Plan:
    samples, batch_size = stage.global_batch_size, stage.batch_size
    if stage.grpo:  # a step's questions, each of which is answered several times
        samples = batch_size = stage.global_batch_size // stage.grpo.answers
    return Plan(
        open_sources(stage, mixture, file, collator),
        [source.weight for source in mixture.sources],
        stage.steps,
        samples,
        batch_size,
        stage.seed,
        mixture.single_source_share,
    )


def save(trainer: Trainer, stage: Stage, output: Path) -> None:
    """The trained checkpoint: adapters as adapters, all else in bfloat16 with its code."""
    if stage.fsdp:
        trainer.save_model(str(output))
    elif trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not stage.lora:
            model = model.to(torch.bfloat16)
        model.save_pretrained(output)
    if trainer.is_world_process_zero():
        trainer.processing_class.save_pretrained(output)


def describe(plan: Plan, mixture: MixtureSettings) -> str:
    lines = [
        f"{category}: " + ", ".join(f"{name} {share:.1%}" for name, share in parts.items())
        for category, parts in shares(mixture).items()
    ]
    lines += [source.report() for source in plan.sources if source.measures is not None]
    if all(source.measures is not None for source in plan.sources):
        lines.append(f"padding: {padding_share(iter(plan)):.1%} of {plan.steps:,} steps' tokens")
    return "\n".join(lines)


def train(args: argparse.Namespace) -> None:
    """Train as `jina-vlm train` was told.

    Raises:
        SystemExit: a setting is wrong, or too many samples are.
    """
    with joined_processes() as state:
        train_stage(args, state)


@contextmanager
def joined_processes() -> Iterator[PartialState]:
    """This process among those that train."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    try:
        yield state
    finally:
        # A process that ends with gloo's threads alive is aborted, its work done or not.
        state.destroy_process_group()


def choose_model(stage: Any, args: argparse.Namespace) -> None:
    """Begin a stage with the command's model, or with one that lies beside the stage's file."""
    if args.model:
        stage.model = args.model
    elif beside(args.stage, stage.model).is_dir():
        stage.model = str(beside(args.stage, stage.model).resolve())


def train_stage(args: argparse.Namespace, state: PartialState) -> None:
    run = args.output / "run"
    try:
        stage, mixture = read_stage(args.stage, state.num_processes)
        if stage.fsdp and not torch.accelerator.is_available():
            raise SettingsError(
                args.stage, "fsdp", True, "accelerate shards on GPUs alone, and there is none. Leave it out."
            )
        choose_model(stage, args)
        last = check_resumption(run, stage, mixture, args.resume, args.stage)
        if args.plan_only:
            processor = load_processor(stage, args.stage, load_config(stage, args.stage))
            print(describe(make_plan(stage, mixture, args.stage, make_collator(stage, processor)), mixture))
            return
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "tensorboard")
        trainer = make_trainer(stage, mixture, args.stage, run, state.num_processes)
    except (SettingsError, TooManyBadSamples, ValueError) as error:
        sys.exit(f"error: {error}")
    if state.is_main_process:
        print(describe(trainer.plan, mixture), flush=True)
        run.mkdir(parents=True, exist_ok=True)
        (run / STAGE_FILE).write_text(
            json.dumps({"stage": dataclasses.asdict(stage), "mixture": dataclasses.asdict(mixture)}, indent=2) + "\n",
            encoding="utf-8",
        )
    trainer.train(resume_from_checkpoint=last)
    save(trainer, stage, args.output)
    if state.is_main_process:
        print(f"Saved to {args.output}. Curves: {run / 'curves.png'}.")
