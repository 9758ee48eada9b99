"""`train`: train or fine-tune by a recipe."""

import argparse
from pathlib import Path

from . import options


RECIPES = Path(__file__).parent.parent / "training" / "recipes"
DESCRIPTION = """\
Train a checkpoint as a recipe says: a YAML file that names model, data, steps
and learning rates. The output folder holds the trained checkpoint, and under
`run` the Trainer's own, TensorBoard's files and loss curves.
"""
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.endswith("_mixture"))
EXAMPLES = f"""\
examples:
  jina-vlm train finetune_lora --output mine
  jina-vlm train my_recipe.yaml --output mine --resume
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
    parser.add_argument("--output", type=Path, required=True, help="folder of the trained checkpoint")
    parser.add_argument("--model", help="start from this folder or repository rather than the recipe's `model`")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument(
        "--plan-only",
        action="store_true",
        help="check everything, print what would be seen, and stop before any model is built",
    )
    parser.set_defaults(run=run, interrupted="The same command with --resume goes on from the last checkpoint.")


def run(args: argparse.Namespace) -> None:
    with options.needing("train"):
        from jina_vlm_tools.training.train import train
    train(args)
