"""What the tests of the harnesses share: how lm-eval is started, local data in a task's own format, the small
checkpoint.

lm-eval runs as it is installed, on `checkpoints/tiny` as it lies there: nothing is registered or replaced. What it
says is compared with what this repository's own way of asking gives: `apply_chat_template`, `generate`, exact words.
"""

import os
from pathlib import Path

import pytest
import yaml


os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["no_proxy"] = "127.0.0.1"

ROOT = Path(__file__).parents[3]
CHECKPOINT = ROOT / "checkpoints" / "tiny"
TASKS = ROOT / "evaluation" / "tasks"


class Harness:
    """lm-eval with local copies of tasks, and the small checkpoint in it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def copy_task(self, source: Path, features, rows: dict[str, list[dict]], **changes) -> str:
        """A task like the one in the file `source`, with these rows for each split instead of the Hub's. Its name."""
        import datasets

        name = f"{source.stem}_local"
        files = {}
        for split, content in rows.items():
            files[split] = str(self.folder / f"{name}_{split}.parquet")
            datasets.Dataset.from_list(content, features=features).to_parquet(files[split])
        changes = {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": files}, **changes}
        config = {"include": str(source), "task": name, **changes}
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        return name

    def __call__(
        self,
        task: str,
        model: str = "hf-multimodal",
        batch_size: int = 8,
        num_fewshot: int | None = None,
        **model_args,
    ) -> dict:
        """lm-eval's scores of a task or group, and its samples in the order of the rows: of each task, and of this
        one."""
        import lm_eval
        from lm_eval.tasks import TaskManager

        results = lm_eval.simple_evaluate(
            model=model,
            model_args={"pretrained": str(CHECKPOINT), "trust_remote_code": True, "dtype": "float32", **model_args},
            tasks=[task],
            task_manager=TaskManager(include_path=[str(self.folder), str(TASKS)]),
            batch_size=batch_size,
            num_fewshot=num_fewshot,
            device="cpu",
            apply_chat_template=model == "hf-multimodal",
            bootstrap_iters=0,
        )
        samples = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in results["samples"].items()}
        return {"scores": results["results"][task], "samples": samples.get(task), "all_samples": samples}


@pytest.fixture(scope="session")
def harness(tmp_path_factory) -> Harness:
    return Harness(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(CHECKPOINT, trust_remote_code=True)


@pytest.fixture(scope="session")
def model():
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(CHECKPOINT, trust_remote_code=True, dtype=torch.float32).eval()
