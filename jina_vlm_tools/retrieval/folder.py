"""The published retrieval folder: a PEFT adapter, and what sentence-transformers keeps beside one.

adapter_config.json, adapter_model.safetensors     for PEFT, transformers and vLLM
modules.json, 1_Dense, 2_MultiVectorMask, ...      for sentence-transformers, which writes them: 1_Dense projects
processor_config.json, tokenizer.json, *.py, ...   the processor, with the number of tiles that was trained with
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import snapshot_download
from jina_vlm import JinaVLMConfig, JinaVLMForConditionalGeneration, JinaVLMProcessor
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import cached_file

from jina_vlm_tools.files import new_folder

from .inputs import PROMPTS


if TYPE_CHECKING:
    from peft import PeftConfig


ADAPTER_CONFIG, ADAPTER, MODULES = "adapter_config.json", "adapter_model.safetensors", "modules.json"
SETTINGS = "config_sentence_transformers.json"
TASK = "retrieval"
# PEFT's own for a generating model. Every engine finds these: those that load the model without its head drop `model.`
PREFIX, MODEL = "base_model.model.", "model."
# Beside the adapter, for losses that take a batch apart. Engines do not read it.
PROCESSING = {"chat_template": {"tiles_by_sample": True}}


@dataclass(frozen=True)
class RetrievalFolder:
    """
    What [`read_folder`] found.

    Args:
        path: The folder, which PEFT reads the adapter from.
        base: A folder, or an id of the Hub.
        projector: From the base's width to that of multi-vectors, float32.
        task: What the adapter is for.
        parts: Of the model that it changes: "vision_model", "connector", "language_model".
    """

    path: str
    base: str
    projector: nn.Linear
    task: str
    parts: tuple[str, ...]

    def load_processor(self) -> JinaVLMProcessor:
        """The folder's own: it cuts images into as many tiles as were trained with."""
        with _reading(Path(self.path, "processor_config.json")):
            return JinaVLMProcessor.from_pretrained(self.path)


def is_retrieval_folder(place: str | Path, revision: str | None = None, local_files_only: bool = False) -> bool:
    """Whether a folder, or a repository of the Hub, holds an adapter."""
    if Path(place).is_dir():
        return Path(place, ADAPTER_CONFIG).is_file()
    found = cached_file(
        str(place),
        ADAPTER_CONFIG,
        revision=revision,
        local_files_only=local_files_only,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def read_folder(
    place: str | Path, revision: str | None = None, local_files_only: bool = False, base: str | None = None
) -> RetrievalFolder:
    """
    Find the adapter, its base and the projector. The base is looked for beside the folder, by the last part of the
    name in `adapter_config.json`, then by that whole name: folders that are moved together stay together.

    Args:
        place: A folder, or a repository of the Hub.
        base: What is loaded already: it is not looked for.

    Raises:
        FileNotFoundError, ValueError: a part is missing or damaged, or they do not belong together; the message says
            which.
    """
    folder = Path(place)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(place), revision=revision, local_files_only=local_files_only))
    for name in (ADAPTER_CONFIG, ADAPTER):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{place} holds no adapter: there is no {name}. Expected a folder that `write_folder` wrote."
            )
    with _reading(folder / ADAPTER_CONFIG) as file:
        settings = _read_json(file)
        trained_on, kind = settings.get("base_model_name_or_path"), settings.get("peft_type")
        if not isinstance(trained_on, (str, type(None))) or kind != "LORA":
            raise ValueError(f"its base is {trained_on!r}, its kind {kind!r}, expected a name and 'LORA'")
    with _reading(folder / ADAPTER) as file, safe_open(file, "pt") as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118  no dictionary
    projector = _read_projector(folder)
    base = base or find_base(folder, trained_on, local_files_only)
    hidden = JinaVLMConfig.from_pretrained(base, local_files_only=local_files_only).text_config.hidden_size
    widths = {"projector": projector.in_features, "adapter": _adapter_width(shapes)}
    for part, width in widths.items():
        if width not in (None, hidden):
            raise ValueError(
                f"The {part} in {place} is for a model of width {width}, but that of {base} is {hidden}: they do not "
                f"belong together. It was trained on {trained_on}."
            )
    with _reading(folder / SETTINGS) as file:
        task = _read_json(file).get("task", TASK) if file.is_file() else TASK
        if not isinstance(task, str) or "." in task:
            raise ValueError(f"its task is {task!r}, expected a name without a dot")
    return RetrievalFolder(str(folder), base, projector, task, _adapted_parts(shapes))


@contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """
    Raises:
        FileNotFoundError, ValueError: there is no such file, or what is in it is not what is looked for there.
    """
    try:
        yield file
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing. Write or fetch the folder anew.") from error
    except (SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}). Write or fetch the folder anew.") from error


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def find_base(folder: Path, name: str | None, local_files_only: bool = False) -> str:
    """
    Where the base of an adapter in `folder` is: a folder or an id of the Hub.

    Raises:
        FileNotFoundError: it is nowhere.
    """
    if not name:
        raise FileNotFoundError(f"{folder / ADAPTER_CONFIG} names no base: its `base_model_name_or_path` is {name!r}.")
    folder = folder.resolve()
    beside = folder.parent / Path(name).name
    for candidate in (beside, Path(name)):
        if candidate.resolve() != folder and (candidate / "config.json").is_file():
            return str(candidate)
    try:
        JinaVLMConfig.from_pretrained(name, local_files_only=local_files_only)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The base {name!r} of the adapter in {folder} is not there: neither {beside} nor {name} is a folder with "
            f"a checkpoint, and no such one could be had from the Hub. Put it beside the adapter. ({error})"
        ) from error
    return name


def _read_projector(folder: Path) -> nn.Linear:
    """
    Raises:
        FileNotFoundError, ValueError: there is none, or it is not of our kind.
    """
    with _reading(folder / MODULES) as file:
        modules = _read_json(file) if file.is_file() else []
        places = [str(module["path"]) for module in modules if module["type"].endswith(".Dense")]
    if len(places) != 1 or not (folder / places[0] / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} holds no projector: expected {MODULES} to name one `Dense`, with a folder of its weights; it "
            f"names {places or 'none'}. Write the folder by `write_folder`."
        )
    with _reading(folder / places[0] / "config.json") as file:
        settings = _read_json(file)
        activation = settings.get("activation_function", "").rpartition(".")[2]
    if settings.get("bias") or activation != "Identity" or settings.get("use_residual"):
        raise ValueError(
            f"The projector in {folder / places[0]} is not a plain matrix (bias {settings.get('bias')}, activation "
            f"{activation}, residual {settings.get('use_residual', False)}), so that engines would not agree."
        )
    with _reading(folder / places[0] / "model.safetensors") as file:
        return _to_linear(load_file(file)["linear.weight"])


def _to_linear(weight: torch.Tensor) -> nn.Linear:
    width, hidden = weight.shape
    projector = nn.Linear(hidden, width, bias=False).requires_grad_(False)
    projector.weight.copy_(weight)
    return projector


def _adapter_width(shapes: dict[str, list[int]]) -> int | None:
    """Of what the decoder's attention takes; None where that has no LoRA."""
    for name, shape in shapes.items():
        if re.search(r"language_model\.layers\.\d+\.self_attn\.[qkv]_proj\.lora_A\.", name):
            return shape[1]
    return None


def _adapted_parts(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({name.removeprefix(PREFIX).removeprefix(MODEL).partition(".")[0] for name in names}))


# Writing


def write_folder(
    output: str | Path,
    model: nn.Module,
    projector: nn.Linear | torch.Tensor,
    processor: JinaVLMProcessor,
    *,
    base: str | None = None,
    adapter: str = "default",
    task: str = TASK,
    replace: bool = False,
) -> Path:
    """
    Write an adapter and a projector as a folder that PEFT, transformers, sentence-transformers and vLLM read alike.
    vLLM applies adapters to the decoder alone: one with LoRA on the tower or the connector is for [`merge_folder`].

    Args:
        output: It is there as a whole or not at all.
        model: A `PeftModel` of a `JinaVLMForConditionalGeneration` (or of a `JinaVLMModel`), or one of these with an
            adapter that was added by transformers.
        projector: `nn.Linear` without bias, or its weight [width, hidden].
        processor: With the settings that were trained with, such as `image_processor.max_tiles`.
        base (`str`, *optional*): How the base is named: an id of the Hub, or a folder; without one, as the adapter
            names it. A relative folder is found from the working directory, and beside `output`.
        adapter (`str`): Its name in `model`.
        task (`str`): What it is for.
        replace (`bool`): Whether an older `output` makes way.

    Raises:
        ImportError: sentence-transformers is not installed.
        FileExistsError: there is an `output`.
        FileNotFoundError, ValueError: there is no base, the adapter is not LoRA, or the parts do not fit together.
    """
    output = Path(output)
    _refuse_existing(output, replace)
    state, config = _take_adapter(model, adapter)
    base = base or config.base_model_name_or_path
    found = find_base(output, base)
    weight = projector if isinstance(projector, torch.Tensor) else projector.weight
    if isinstance(projector, nn.Linear) and projector.bias is not None:
        raise ValueError(
            "The projector has a bias, which folders do not take: make it by `nn.Linear(..., bias=False)`."
        )
    hidden = JinaVLMConfig.from_pretrained(found).text_config.hidden_size
    if weight.shape[1] != hidden:
        raise ValueError(f"The projector takes vectors of {weight.shape[1]} numbers, but {base} makes {hidden}.")
    with new_folder(output, replace) as made, TemporaryDirectory(dir=made.parent) as loadable:
        # The library loads what it then saves: in between, the base is named by its place.
        _write_adapter(Path(loadable), state, config, found)
        processor.save_pretrained(loadable)
        _save_encoder("multi", loadable, weight, made, task, with_model=False)
        _write_adapter(made, state, config, base)
    return output


def merge_folder(
    folder: str | Path,
    output: str | Path,
    kind: Literal["dense", "multi"],
    *,
    dtype: str = "auto",
    replace: bool = False,
) -> Path:
    """
    Write base and adapter as one checkpoint, for engines without adapters, and for those of tower and connector in
    vLLM. It embeds only: there is no head in it.

    Args:
        folder: As [`read_folder`] takes it.
        output: It is there as a whole or not at all.
        kind (`str`): "dense" (mean, then length 1) or "multi" (projector, then length 1), which is what engines read
            from `modules.json`: a folder is for one of them.
        dtype (`str`): Of the merged weights; the base's own, if "auto".
        replace (`bool`): Whether an older `output` makes way.

    Raises:
        As [`read_folder`] and [`write_folder`].
    """
    if kind not in ("dense", "multi"):
        raise ValueError(f'`kind` must be "dense" or "multi", got {kind!r}.')
    output = Path(output)
    _refuse_existing(output, replace)
    found = read_folder(folder)
    from peft import PeftModel

    model = JinaVLMForConditionalGeneration.from_pretrained(found.base, dtype=dtype)
    merged = PeftModel.from_pretrained(model, found.path).merge_and_unload()
    with new_folder(output, replace) as made, TemporaryDirectory(dir=made.parent) as loadable:
        merged.model.save_pretrained(loadable)
        found.load_processor().save_pretrained(loadable)
        _save_encoder(kind, loadable, found.projector.weight, made, found.task, with_model=True)
    return output


def _refuse_existing(output: Path, replace: bool) -> None:
    if output.exists() and not replace:
        raise FileExistsError(f"{output} is there already. Choose another folder, or pass `replace=True`.")


def _take_adapter(model: nn.Module, adapter: str) -> tuple[dict[str, torch.Tensor], "PeftConfig"]:
    """An adapter's weights by PEFT's names for a generating model, and its settings, which fit both classes."""
    from peft import get_peft_model_state_dict

    known = getattr(model, "peft_config", None) or {}
    if adapter not in known:
        raise ValueError(f"The model has no adapter {adapter!r}; it has {', '.join(known) or 'none'}.")
    state = {}
    for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter).items():
        name = name.removeprefix(PREFIX).removeprefix(MODEL)
        state[f"{PREFIX}{MODEL}{name}"] = tensor.detach().cpu().contiguous()
    config = copy.copy(known[adapter])
    config.inference_mode = True
    if other := [name for name in state if not re.search(r"\.lora_[AB]\.weight$", name)]:
        raise ValueError(
            f"The adapter {adapter!r} holds {other[0]}. Every engine reads LoRA alone: train with a `LoraConfig` "
            "without `modules_to_save`, biases, trained tokens and DoRA."
        )
    modules = sorted({name.removeprefix(f"{PREFIX}{MODEL}").partition(".lora_")[0] for name in state})
    if not isinstance(config.target_modules, str) or not all(
        re.fullmatch(config.target_modules, prefix + module) for module in modules for prefix in ("", MODEL)
    ):
        config.target_modules = modules  # by their ends, which are the same in both classes
    return state, config


def _write_adapter(folder: Path, state: dict[str, torch.Tensor], config: "PeftConfig", base: str) -> None:
    config = copy.copy(config)
    config.base_model_name_or_path, config.revision = base, None
    config.save_pretrained(folder)
    save_file(state, folder / ADAPTER, metadata={"format": "pt"})


def _save_encoder(
    kind: str, loadable: str, weight: torch.Tensor, output: Path, task: str, *, with_model: bool
) -> None:
    """Save what lies in `loadable`, by sentence-transformers, as an encoder."""
    try:
        from sentence_transformers import MultiVectorEncoder, SentenceTransformer
        from sentence_transformers.base.modules import Dense, Normalize, Transformer
        from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
        from sentence_transformers.sentence_transformer.modules import Pooling
    except ImportError as error:
        raise ImportError(
            "The folder's files for sentence-transformers are written by that library, which is not installed, or too "
            f'old: pip install "sentence-transformers>=6.2". ({error})'
        ) from error

    trusted: dict[str, Any] = {"trust_remote_code": True}
    transformer = Transformer(
        loadable,
        model_kwargs={**trusted, "dtype": "auto"},
        config_kwargs=trusted,
        processor_kwargs=trusted,
        processing_kwargs=PROCESSING,
    )
    if not with_model:
        # It would write the adapter by names that only its own class has; 5.24 asks for a PEFT that does not exist.
        transformer.model.save_pretrained = lambda *args, **kwargs: None
    if kind == "multi":
        width, hidden = weight.shape
        dense = Dense(
            hidden,
            width,
            bias=False,
            activation_function=nn.Identity(),
            module_input_name="token_embeddings",
        )
        modules = [transformer, dense, MultiVectorMask(), Normalize(module_input_name="token_embeddings")]
        encoder = MultiVectorEncoder(modules=modules, prompts=PROMPTS, device="cpu")
        dense.to(weight.dtype)  # the library gives all modules the first one's dtype
        dense.linear.weight.data = weight.detach().cpu().contiguous()
    else:
        modules = [transformer, Pooling(transformer.get_embedding_dimension(), "mean"), Normalize()]
        encoder = SentenceTransformer(modules=modules, prompts=PROMPTS, device="cpu")
    encoder.save_pretrained(str(output), create_model_card=False)
    settings_file = output / SETTINGS
    settings = json.loads(settings_file.read_text(encoding="utf-8")) | {"task": task}
    settings_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
