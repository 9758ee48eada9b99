# Copyright 2026 The jina-vlm-transformers authors. Licensed under the Apache License, Version 2.0.
"""Strict loading: a mixin that raises where the library would warn, and the modules that are never quantized."""

import copy
import os
from operator import attrgetter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.quantizers import AutoQuantizationConfig

from .conversion_jina_vlm import collect_conversion_problems, register_released_layout, released_name


# Full names, in the models with and without the head. All that an image says passes the connector, a small part.
NEVER_QUANTIZED = ["model.connector", "connector", "lm_head", "embed_tokens"]
# At least sixteen times the released model's sizes. Memory is allocated by a config, which may be a stranger's.
LARGEST_SIZES = {
    "connector_num_attention_heads": 1024,
    "connector_head_dim": 4096,
    "connector_intermediate_size": 2**18,
    "pooling_size": 64,
    "vision_config.hidden_size": 2**16,
    "vision_config.intermediate_size": 2**18,
    "vision_config.num_hidden_layers": 1024,
    "vision_config.num_attention_heads": 1024,
    "vision_config.num_channels": 64,
    "vision_config.image_size": 2**13,
    "vision_config.patch_size": 2**10,
    "text_config.vocab_size": 2**22,
    "text_config.hidden_size": 2**16,
    "text_config.intermediate_size": 2**18,
    "text_config.num_hidden_layers": 1024,
    "text_config.num_attention_heads": 1024,
    "text_config.num_key_value_heads": 1024,
    "text_config.head_dim": 4096,
    "text_config.max_position_embeddings": 2**30,
}
MOST_TEXT_PARAMETERS = 2**38  # with the head: a hundred times the released model's
DISTRIBUTED_ARGUMENTS = ("tp_plan", "tp_size", "distributed_config")


class CheckpointMixin:
    """Load and save every jina-vlm model strictly, and refuse configs of absurd sizes."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        _check_sizes(config)
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Load a checkpoint of this layout or of the released one. See [`PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: tensors are missing (with `output_loading_info=True` they are returned instead), have other
                shapes, or hold values that this model cannot honor.
            OSError: a file of weights is damaged.
        """
        register_released_layout()  # again: another copy of this code may have registered its own
        kwargs.setdefault("use_safetensors", True)  # the library would open pickles where there are none
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _keep_whole(kwargs["quantization_config"])
        info: dict[str, Any] = {"missing_keys": [], "mismatched_keys": []}
        cause = None
        with collect_conversion_problems() as problems:
            try:
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path,
                    *args,
                    # Both are reported below, by name.
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **kwargs,
                )
            except SafetensorError as error:
                raise OSError(_name_damaged(pretrained_model_name_or_path, error)) from error
            except RuntimeError as error:
                if not problems:
                    raise
                cause = error
        if not ignore_mismatched_sizes:
            problems += [
                f"{_both_names(name)} has shape {list(given)}, expected {list(expected)}."
                for name, given, expected in sorted(info["mismatched_keys"])
            ]
        if kwargs.get("state_dict") is None and not output_loading_info:
            mismatched = {name for name, _, _ in info["mismatched_keys"]}
            problems += [f"{_both_names(name)} is missing." for name in sorted(set(info["missing_keys"]) - mismatched)]
        if problems:
            if any(kwargs.get(name) is not None for name in DISTRIBUTED_ARGUMENTS):
                problems.append(
                    "The released layout, whose tensors hold several of ours, cannot be loaded in parts by several "
                    "processes. If this is one, load it in one process, `save_pretrained` it, and load what that "
                    "wrote."
                )
            message = f"Cannot load {cls.__name__} from {pretrained_model_name_or_path}:\n" + "\n".join(problems)
            raise ValueError(message) from cause
        # Saving writes the names that modules have: there is nothing to reverse, which other libraries' savers try to.
        model._weight_conversions = []
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> Any:
        """Save in this layout; the released one is read, not written. See [`PreTrainedModel.save_pretrained`]."""
        if save_original_format:
            raise ValueError("jina-vlm saves its own layout only, got `save_original_format=True`. Leave it out.")
        kwargs["save_original_format"] = False
        return super().save_pretrained(save_directory, *args, **kwargs)


def _check_sizes(config: PreTrainedConfig) -> None:
    for name, largest in LARGEST_SIZES.items():
        size = attrgetter(name)(config)
        if not isinstance(size, int) or not 1 <= size <= largest:
            raise ValueError(f"`{name}` is {size}; expected 1 to {largest}.")
    text = config.text_config
    heads = text.num_attention_heads + text.num_key_value_heads
    in_block = 2 * heads * text.head_dim + 3 * text.intermediate_size
    count = text.hidden_size * (2 * text.vocab_size + text.num_hidden_layers * in_block)
    if count > MOST_TEXT_PARAMETERS:
        raise ValueError(
            f"`text_config` describes {count:.2g} parameters; expected at most {MOST_TEXT_PARAMETERS:.2g}."
        )


def _name_damaged(checkpoint: str | os.PathLike | None, error: Exception) -> str:
    damaged = []
    for path in sorted(Path(checkpoint).glob("*.safetensors")) if checkpoint else []:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            damaged.append(path.name)
    what = ", ".join(damaged) or "a file of its weights"
    return f"Cannot load {checkpoint}: {what}: damaged or incomplete ({error}). Copy or download it again."


def _both_names(name: str) -> str:
    released = released_name(name)
    return f"`{name}`" if released == name else f"`{name}` (released: `{released}`)"


def _keep_whole(quantization_config: Any) -> Any:
    """Copy a quantization config, an object or a dictionary, and add to the modules that it skips."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(dict(quantization_config))
    else:
        quantization_config = copy.deepcopy(quantization_config)
    never = NEVER_QUANTIZED
    if getattr(quantization_config, "include_input_output_embeddings", False):  # the caller asks for these two
        never = [name for name in never if name not in ("lm_head", "embed_tokens")]
    for name in ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules"):
        if hasattr(quantization_config, name):
            skipped = getattr(quantization_config, name) or []
            setattr(quantization_config, name, list(dict.fromkeys([*skipped, *never])))
    return quantization_config
