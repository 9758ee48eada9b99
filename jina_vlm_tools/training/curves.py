"""Loss curves as an image."""

from pathlib import Path

from matplotlib.figure import Figure


def draw_curves(history: list[dict], file: Path) -> None:
    """Draw what the log history has of losses, rewards, accuracy and learning rates. As PNG."""
    panels = [
        ("reward", {"reward": "of its answers"}),
        ("distance from the start (KL)", {"kl": "of its answers"}),
        ("entropy", {"entropy": "of its answers"}),
        ("loss", {"loss": "training", "eval_loss": "held out"}),
        ("accuracy", {"eval_accuracy": "held out"}),
        ("learning rate", {f"learning_rate_{part}": part for part in ("encoder", "connector", "decoder")}),
    ]
    panels = [(title, lines) for title, lines in panels if any(name in entry for entry in history for name in lines)]
    if not panels:
        return
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, label in lines.items():
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
        axes.set(title=title, xlabel="step")
        axes.legend()
    figure.savefig(file, dpi=120)
