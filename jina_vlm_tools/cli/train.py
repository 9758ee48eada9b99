"""`train`: train or fine-tune by a recipe."""

import argparse
import shutil
from pathlib import Path

from jina_vlm_tools.extras import needing


RECIPES = Path(__file__).parent.parent / "training" / "recipes"
DESCRIPTION = """\
Train a checkpoint as a recipe says: a YAML file that names model, data, steps
and learning rates. The output folder holds the trained checkpoint, and under
`run` the Trainer's own, TensorBoard's files and loss curves.
"""
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.endswith("_mixture"))
EXAMPLES = f"""\
examples:
  jina-vlm train finetune_lora --copy recipes     # to be edited
  jina-vlm train recipes/finetune_lora.yaml --output mine --plan-only
  jina-vlm train recipes/finetune_lora.yaml --output mine
  torchrun --nproc-per-node 8 -m jina_vlm_tools train stage2 --output mine

recipes that come along: {", ".join(NAMES)}
"""


def find_recipe(name: str) -> Path:
    brought = RECIPES / f"{name}.yaml"
    return brought if brought.is_file() and not Path(name).exists() else Path(name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "stage", metavar="RECIPE", type=find_recipe, help="a YAML file, or the name of one that comes along"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, help="folder of the trained checkpoint")
    target.add_argument(
        "--copy", type=Path, metavar="DIR", help="copy the recipe and the mixture it names there to edit, and stop"
    )
    parser.add_argument("--model", help="start from this folder or repository rather than the recipe's `model`")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument(
        "--plan-only",
        action="store_true",
        help="check everything, print what would be seen, and stop before any model is built",
    )
    parser.set_defaults(
        run=run, check=check, interrupted="The same command with --resume goes on from the last checkpoint."
    )


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for option in ("model", "resume", "plan_only"):
        if args.copy and getattr(args, option):
            parser.error(f"--{option.replace('_', '-')} is for training, and --copy only copies: leave one out")


def copy_recipe(recipe: Path, folder: Path) -> None:
    """A recipe, and the mixture beside it if it names one, into a folder. A mixture that is there stays: recipes share
    it."""
    from jina_vlm_tools.training import settings, stages

    copy = folder / recipe.name
    if copy.exists():
        raise FileExistsError(f"{copy}: already there. Name another folder, or edit what is there.")
    mixture = None if is_for_retrieval(recipe) else settings.read(recipe, stages.Stage).mixture
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(recipe, copy)
    print(copy)
    if mixture is None:
        return
    mixture = stages.beside(recipe, mixture)
    beside = folder / mixture.name
    if beside.exists():
        print(f"{beside} (kept as it is)")
    else:
        shutil.copyfile(mixture, beside)
        print(beside)


def is_for_retrieval(recipe: Path) -> bool:
    """Whether a recipe trains an embedder on pairs, rather than a model that answers."""
    import yaml

    try:
        return "pairs" in (yaml.safe_load(recipe.read_text(encoding="utf-8")) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError):
        return False  # its reader says what is wrong


def run(args: argparse.Namespace) -> None:
    with needing("train"):
        from jina_vlm_tools.training.train import train
    if args.copy:
        copy_recipe(args.stage, args.copy)
    elif is_for_retrieval(args.stage):
        with needing("retrieval"):
            from jina_vlm_tools.retrieval.train import train as train_retrieval
        train_retrieval(args)
    else:
        train(args)
