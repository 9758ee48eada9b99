"""What is used of the library that it calls private: each name stands here, with why.

A version of the library that lost one fails here in one line; so does a private name that is newly used, or no longer.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator

import datasets
import pytest
from conftest import ROOT
from torch import nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Trainer,
    __version__,
)
from transformers.image_processing_utils import BaseImageProcessor


# By what has them. Declarations are how the library's own models tell what they can; there is no other way.
DECLARATION = "a declaration: how every model tells it"
PRIVATE = {
    PreTrainedConfig: {"_auto_class": DECLARATION},
    PreTrainedModel: {
        "_auto_class": DECLARATION,
        "_can_compile_fullgraph": DECLARATION,
        "_can_record_outputs": DECLARATION,
        "_keys_to_ignore_on_load_unexpected": DECLARATION,
        "_no_split_modules": DECLARATION,
        "_skip_keys_device_placement": DECLARATION,
        "_supports_attention_backend": DECLARATION,
        "_supports_flash_attn": DECLARATION,
        "_supports_flex_attn": DECLARATION,
        "_supports_sdpa": DECLARATION,
        "_tied_weights_keys": DECLARATION,
        "_tp_plan": DECLARATION,
        "_init_weights": "what every model with parameters of its own overrides",
        "_adjust_missing_and_unexpected_keys": "the base model alone drops the head, which vLLM must find",
    },
    nn.Module: {"_apply": "casts keep the rotary embedding's frequencies in float32"},
    GenerationMixin: {
        "_expand_inputs_for_generation": "beams repeat images by sample, not tile by tile",
    },
    GenerationConfig: {"_from_model_config": "a released config.json is full of another version's defaults"},
    ProcessorMixin: {
        "_auto_class": DECLARATION,
        "_get_arguments_from_pretrained": "a released folder names other code, which the Auto classes would ask to "
        "run",
        "_merge_kwargs": "what every processor calls",
        "_process_images": "what every processor calls",
    },
    BaseImageProcessor: {
        "_auto_class": DECLARATION,
        "_preprocess_image_like_inputs": "where the base class leaves preprocessing to its subclasses",
        "_set_attributes": "what every image processor calls",
    },
    Trainer: {"_created_lr_scheduler": "a second `train` makes a scheduler anew, as of the library's own"},
    datasets.Dataset: {"_fingerprint": "what was measured of a data set is measured again once that changed"},
}

BUNDLE = sorted(ROOT.glob("*_jina_vlm.py"))
OTHERS = sorted(path for folder in ("jina_vlm_tools", "experiments") for path in (ROOT / folder).rglob("*.py"))


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("jina_vlm", "jina_vlm_tools", "experiments")


def read_names(trees: list[ast.Module]) -> Iterator[str]:
    """Private names that are imported, or read or set on something, and that no class in these modules has of
    itself."""
    own, used = set(), set()
    ours = {
        node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and not node.bases
    }
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ClassDef):
            own |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            if all(getattr(base, "id", None) in ours for base in node.bases):  # else what it sets may be its base's
                own |= {
                    item.attr
                    for item in ast.walk(node)
                    if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store)
                }
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        if isinstance(node, ast.ImportFrom) and not node.level:
            used |= {*node.module.split("."), *(alias.name for alias in node.names)}
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            used |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
    return filter(is_private, used - own)


def overridden_names(modules: list) -> Iterator[str]:
    """Private names that classes of ours define and classes of others, which they stand on, define too."""
    classes = {cls for module in modules for cls in vars(module).values() if isinstance(cls, type) and is_ours(cls)}
    for cls in classes:
        theirs = {name for base in cls.__mro__ if not is_ours(base) for name in vars(base)}
        yield from (name for name in vars(cls) if is_private(name) and name in theirs)


def test_private_names_are_these():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (*BUNDLE, *OTHERS)]
    modules = [importlib.import_module(f"jina_vlm.{path.stem}") for path in BUNDLE]
    modules.append(importlib.import_module("jina_vlm_tools.training.trainer"))
    used = {*read_names(trees), *overridden_names(modules)} - {"_abc_impl"}
    listed = {name for uses in PRIVATE.values() for name in uses}
    if new := sorted(used - listed):
        pytest.fail(
            f"{', '.join(new)}: private, and used. Is there no public way? Else list it, with why.", pytrace=False
        )
    if unused := sorted(listed - used):
        pytest.fail(f"{', '.join(unused)}: no longer used. Take it off the list.", pytrace=False)


@pytest.mark.parametrize(
    ("owner", "name"),
    [pytest.param(owner, name, id=f"{owner.__name__}.{name}") for owner, uses in PRIVATE.items() for name in uses],
)
def test_the_library_still_has(owner, name):
    # What only instances have is set in the class's own code.
    if not hasattr(owner, name) and f"self.{name} = " not in inspect.getsource(owner):
        pytest.fail(
            f"transformers {__version__}: {owner.__name__} lost {name} ({PRIVATE[owner][name]}).", pytrace=False
        )
