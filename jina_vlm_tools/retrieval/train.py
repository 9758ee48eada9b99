"""Train an adapter and a projector on pairs, as a recipe says. The output folder is a retrieval folder, and has under
`run` the Trainer's own."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments, set_seed

from jina_vlm_tools.training.lora import add_adapters
from jina_vlm_tools.training.settings import SettingsError
from jina_vlm_tools.training.train import STAGE_FILE, choose_model, joined_processes, last_checkpoint, shared_arguments

from .folder import is_retrieval_folder, read_folder, write_folder
from .pairs import Pairs, PairsCollator, RetrievalStage, read_stage
from .training import Matcher, RetrievalTrainer, Retriever, Weights


def load(stage: RetrievalStage, file: Path) -> tuple[PeftModel, nn.Linear, JinaVLMProcessor, str]:
    """The model with its adapter in training, the projector, the processor, and the base's name.

    Raises:
        SettingsError: adapter and projector are both there and asked for, or neither.
    """
    dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
    goes_on = is_retrieval_folder(stage.model)
    if goes_on == (stage.lora is not None):
        problem = f"{stage.model} brings an adapter: leave it out." if goes_on else "expected settings of an adapter."
        raise SettingsError(file, "lora", stage.lora and dataclasses.asdict(stage.lora), problem)
    if goes_on:
        found = read_folder(stage.model)
        base = JinaVLMForConditionalGeneration.from_pretrained(found.base, dtype=dtype)
        model = PeftModel.from_pretrained(base, found.path, is_trainable=True)
        name = model.peft_config["default"].base_model_name_or_path
        projector, processor = found.projector, found.load_processor()
    else:
        base = JinaVLMForConditionalGeneration.from_pretrained(stage.model, dtype=dtype)
        projector = nn.Linear(base.config.get_text_config().hidden_size, stage.width, bias=False)
        nn.init.orthogonal_(projector.weight)
        model, name = add_adapters(base, stage.lora), stage.model
        processor = JinaVLMProcessor.from_pretrained(stage.model)
    processor.image_processor.max_tiles = stage.max_tiles
    return model, projector.float().requires_grad_(True), processor, name


def arguments(stage: RetrievalStage, run: Path, processes: int) -> TrainingArguments:
    """Of the Trainer, for a stage in the folder `run`."""
    return TrainingArguments(
        **shared_arguments(stage, run, processes),
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=stage.warmup_steps,
        train_sampling_strategy="sequential",  # the pairs lie in their order
        ddp_find_unused_parameters=True,  # batches of texts have none for images
    )


def train(args: argparse.Namespace) -> None:
    """Train as `jina-vlm train` was told.

    Raises:
        SystemExit: a setting is wrong.
    """
    with joined_processes() as state:
        train_stage(args, state)


def train_stage(args: argparse.Namespace, state: PartialState) -> None:
    """As [`train`], in one of the processes that `state` knows."""
    run = args.output / "run"
    try:
        stage = read_stage(args.stage)
        choose_model(stage, args)
        last = check_resumption(run, stage, args.resume, args.stage)
        pairs = Pairs(stage, args.stage, stage.batch_size * state.num_processes)
        if args.plan_only:
            print(f"{len(pairs):,} pairs in {stage.steps:,} steps")
            return
        set_seed(stage.seed)
        model, projector, processor, base = load(stage, args.stage)
    except ValueError as error:
        sys.exit(f"error: {error}")
    config, inner = model.config, model.get_base_model()
    dims = [dim for dim in config.matryoshka_dimensions or [] if dim <= config.get_text_config().hidden_size]
    kind = Matcher if stage.loss == "cosent" else Retriever
    retriever = kind(
        inner,
        projector,
        dims or [config.get_text_config().hidden_size],
        Weights(temperature=stage.temperature, agreement=stage.agreement),
        sees=any(parameter.requires_grad for parameter in inner.model.vision_model.parameters()),
    )
    trainer = RetrievalTrainer(
        retriever, arguments(stage, run, state.num_processes), PairsCollator(processor, stage.max_length), pairs
    )
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "tensorboard")
    if state.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        (run / STAGE_FILE).write_text(json.dumps(dataclasses.asdict(stage), indent=2) + "\n", encoding="utf-8")
    trainer.train(resume_from_checkpoint=last)
    if state.is_main_process:
        write_folder(args.output / stage.task, model, projector, processor, base=base, task=stage.task, replace=True)
        print(f"Saved to {args.output / stage.task}.")


def check_resumption(run: Path, stage: RetrievalStage, resume: bool, file: Path) -> str | None:
    """The checkpoint to go on from. A run goes on as it began."""
    last = last_checkpoint(run)
    if not resume:
        if last:
            raise ValueError(f"{run} holds a run already. Go on with it by --resume, or name another folder.")
        return None
    if not last:
        raise ValueError(f"{run} holds no checkpoint to go on from. Leave --resume out.")
    before = json.loads((run / STAGE_FILE).read_text(encoding="utf-8"))
    for key, value in dataclasses.asdict(stage).items():
        if value != before.get(key):
            raise SettingsError(file, key, value, f"the run in {run} began with {before.get(key)!r}.")
    return last
