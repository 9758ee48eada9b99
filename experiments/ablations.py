"""Three choices of the paper, tried on the small model: how patches are pooled, which blocks of the tower the
connector sees, and how much of the training is text.

    python -m experiments.ablations

Every variant is trained as `experiments.grid` says, and compared with the paper's own choice, the base, seed by seed.
Written is `ablations.csv`: per variant and column the accuracy, its change and that change's interval, the tokens of
an image and what a training costs. (With all that it needs: `make ablations`.)
"""

import argparse
import dataclasses
import statistics

import torch
from jina_vlm.modeling_jina_vlm import JinaVLMConnector
from torch import nn

from jina_vlm_tools import markdown

from .grid import MEAN, Setting, Training, add_arguments, chance, changes, check_arguments, run, write_csv
from .grid_model import DEPTH, FEATURE_LAYERS


class Zeros(nn.Module):
    """Any features to zeros [..., width]."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.new_zeros(*features.shape[:-1], self.width)


class MeanPooling(JinaVLMConnector):
    """The connector with a window's mean in the place of attention: where all scores are zero, all patches weigh the
    same."""

    def __init__(self, config):
        super().__init__(config)
        self.q_proj, self.k_proj = Zeros(self.q_proj.out_features), Zeros(self.k_proj.out_features)


def _blocks(*layers: int) -> str:
    return f"block{'s' if len(layers) > 1 else ''} {' and '.join(str(layer + 1) for layer in layers)} of {DEPTH}"


BASE = Training(seed=0)
# By ablation and variant. The paper's choice comes first, but for texts, whose shares are in order.
VARIANTS = {
    ("pooling", "attention, 2 x 2"): BASE,
    ("pooling", "mean, 2 x 2"): dataclasses.replace(BASE, connector=MeanPooling),
    ("pooling", "none"): dataclasses.replace(BASE, pooling_size=1),
    ("feature layers", _blocks(*FEATURE_LAYERS)): BASE,
    **{
        ("feature layers", _blocks(layer)): dataclasses.replace(BASE, feature_layers=(layer,))
        for layer in (*FEATURE_LAYERS, DEPTH - 1)
    },
    ("text", "0 %"): dataclasses.replace(BASE, left_out=("modality", "text")),  # as `leave_one_out` has it
    ("text", "15 %"): BASE,
    ("text", "30 %"): dataclasses.replace(BASE, text_share=0.3),
}


def with_seeds(variant: Training, seeds: list[int]) -> list[Training]:
    return [dataclasses.replace(variant, seed=seed) for seed in seeds]


def summary(answers: dict[Training, dict], seeds: list[int], chances: dict[str, float]) -> list[dict]:
    """Per ablation, variant and column: what `changes` gives, tokens of an image, and seconds of a training."""
    base = [answers[training] for training in with_seeds(BASE, seeds)]
    rows = []
    for (ablation, name), variant in VARIANTS.items():
        results = [answers[training] for training in with_seeds(variant, seeds)]
        about = {
            "ablation": ablation,
            "variant": name,
            "image_tokens": results[0]["image_tokens"],
            "cpu_seconds": round(statistics.mean(result["cpu_seconds"] for result in results)),
        }
        rows += [about | row for row in changes(base, results, chances)]
    return rows


def table(rows: list[dict]) -> str:
    """The accuracy over all columns, and what changes it, as markdown."""
    lines = []
    for row in rows:
        if row["column"] == MEAN:
            change = f"{row['change']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f})"
            is_base = VARIANTS[row["ablation"], row["variant"]] == BASE
            lines.append(
                [
                    row["ablation"],
                    row["variant"],
                    str(row["image_tokens"]),
                    str(row["cpu_seconds"]),
                    f"{row['accuracy']:.1f}",
                    "" if is_base else change,
                ]
            )
    return markdown.table(
        ["Ablation", "Variant", "Tokens of an image", "CPU s a training", "Right, %", "Change (interval)"],
        lines,
        figures=2,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    check_arguments(args)
    trainings = {training for variant in VARIANTS.values() for training in with_seeds(variant, args.seeds)}
    setting = Setting(tuple(args.stages), args.start, args.questions)
    answers = run(sorted(trainings, key=lambda training: training.name), setting, args.output, args.workers)
    rows = summary(answers, args.seeds, chance(setting))
    write_csv(rows, args.results / "ablations.csv")
    print(table(rows))


if __name__ == "__main__":
    main()
