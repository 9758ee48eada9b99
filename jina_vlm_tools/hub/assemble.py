"""Make of a checkpoint and our code a folder that `from_pretrained(..., trust_remote_code=True)` can load."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi, snapshot_download
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from jina_vlm.conversion_jina_vlm import is_released_config
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from jina_vlm_tools.files import ROOT, TEMPLATE

from . import PublishingError
from .mlx import READ, is_mlx_config, restore_released, writes_images


# Tokenizer, settings and modules take about 15 MB with the released vocabulary.
ROOM_BESIDE_WEIGHTS = 32 * 1024**2
RENAMED = (
    "They were converted from the released layout: "
    "tensors were renamed and split, and the tower's last blocks, which are never used, left out. "
    "No value was changed by that."
)


@dataclass(frozen=True)
class Assembled:
    """`changes`: sentences on what was done to the weights; `commit`: of the Hub's repository that they came from."""

    changes: list[str]
    commit: str | None


def assemble(weights: str, folder: Path, dtype: str = "auto", max_shard_size: str = "2GB") -> Assembled:
    """
    Write weights, tokenizer, settings and modules into `folder`, in this repository's layout.

    Args:
        weights: A folder or an id of the Hub, in the released layout, MLX's or this one.
        folder: An empty one. MLX's layout is also made whole in there for a while, which takes as much room again.
        dtype: Of the weights; `"auto"` is the checkpoint's own.

    Raises:
        PublishingError: the disk is too small or full.
        OSError, ValueError: the checkpoint cannot be read; the message names what is wrong with it.
        HfHubHTTPError: the Hub refuses, or knows no such checkpoint.
    """
    commit = None if Path(weights).is_dir() else HfApi().repo_info(weights).sha
    revision = commit or "main"
    config, _ = PreTrainedConfig.get_config_dict(weights, revision=revision)
    if not is_mlx_config(config):
        changes = [RENAMED] if is_released_config(config) else []
        return Assembled(changes + _write(weights, revision, folder, dtype, max_shard_size), commit)
    if commit:
        weights = snapshot_download(weights, revision=commit, allow_patterns=READ)
    has_template = writes_images(JinaVLMProcessor.from_pretrained(weights))
    with TemporaryDirectory(dir=folder, prefix=".whole-") as whole:
        try:
            changes = [restore_released(Path(weights), Path(whole))]
        except (OSError, SafetensorError) as error:
            raise PublishingError(_no_room(folder, str(error))) from error
        if not has_template:
            shutil.copyfile(TEMPLATE, Path(whole, TEMPLATE.name))
            changes.append("MLX's copy had no chat template that writes images: this one comes with the code.")
        return Assembled(changes + _write(whole, revision, folder, dtype, max_shard_size), commit)


def _write(weights: str, revision: str, folder: Path, dtype: str, max_shard_size: str) -> list[str]:
    processor = JinaVLMProcessor.from_pretrained(weights, revision=revision)
    model = JinaVLMForConditionalGeneration.from_pretrained(
        weights, revision=revision, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
    )

    changes = []
    if dtype != "auto":
        changes.append(f"They were cast to {dtype}.")
    if cover_structural_rows(model):
        changes.append(
            "The `lm_head` rows of the structural tokens, which are never an answer, "
            "were made equal to that of an unused entry: engines that ignore `suppress_tokens`, as vLLM does, could "
            "sample them otherwise."
        )
    if processor.chat_template is None:
        processor.chat_template = TEMPLATE.read_text(encoding="utf-8")

    # no tensor is counted twice: tied ones are one parameter
    needed = ROOM_BESIDE_WEIGHTS + sum(p.numel() * p.element_size() for p in model.parameters())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise PublishingError(_no_room(folder, f"{free / 1e9:.2f} GB are free, {needed / 1e9:.2f} GB are needed"))
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        # The page's license is that of the weights; this is the modules'.
        shutil.copyfile(ROOT / "LICENSE", folder / "CODE_LICENSE")
    except (OSError, SafetensorError) as error:
        raise PublishingError(_no_room(folder, str(error))) from error
    return changes


def cover_structural_rows(model: JinaVLMForConditionalGeneration) -> bool:
    """
    Give the structural tokens the `lm_head` row of the last base entry, a filler that no text uses.

    Engines with a head of their own ignore `suppress_tokens`, and would sample these tokens where their rows are
    random or trained. Here they are suppressed before anything is chosen, so that greedy and sampled answers stay what
    they were. Tokens behind them are not suppressed, and keep their rows. A head that shares the embedding's weights
    is left alone: the rows are what images are marked with.

    Returns:
        Whether there are such rows, so that these are equal now.
    """
    if model.config.tie_word_embeddings:
        return False
    structural = model.config.structural_token_ids
    weight = model.lm_head.weight.detach().clone()  # not in place: it may be mapped from the checkpoint's file
    weight[structural] = weight[min(structural) - 1].clone()
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return True


def _no_room(folder: Path, what: str) -> str:
    return (
        f"The bundle could not be written to {folder.parent}: {what}. Make room there, or choose another folder "
        "(where you name none: by TMPDIR). Nothing was left behind."
    )
