"""Both harnesses on the small checkpoint's own questions: their scores are our own count's, answer by answer."""

import json
import subprocess
import sys

import pytest
import servers
from conftest import CHECKPOINT, ROOT

from evaluation import shapes, table
from experiments.eval_tiny import evaluate


SAMPLES = 208  # 13 of each task and language


@pytest.fixture(scope="module")
def own(model, processor) -> list[dict]:
    """The questions and answers of `experiments.eval_tiny`."""
    results = evaluate(model, processor, SAMPLES, batch_size=16)
    assert 0.8 < sum(result["right"] for result in results) / SAMPLES < 1, (
        "a score that nothing could change shows nothing"
    )
    return results


@pytest.fixture(scope="module")
def task(harness) -> str:
    """The task's own file, on these rows."""
    source = ROOT / "evaluation" / "tasks" / "shapes" / "shapes.yaml"
    return harness.copy_task(source, shapes.FEATURES, {"test": shapes.rows(SAMPLES)})


@pytest.mark.parametrize("batch_size", [1, 8])
def test_lm_eval(harness, task, own, batch_size):
    results = harness(task, batch_size=batch_size)
    assert len(results["samples"]) == SAMPLES
    assert [sample["resps"][0][0].strip() for sample in results["samples"]] == [result["given"] for result in own]
    assert [bool(sample["exact_words"]) for sample in results["samples"]] == [result["right"] for result in own]
    assert results["scores"]["exact_words,none"] == pytest.approx(sum(result["right"] for result in own) / SAMPLES)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The URL of the bundle, served as the guide says."""
    port = servers.free_port()
    command = [
        sys.executable, "-m", "jina_vlm_tools", "serve", str(CHECKPOINT),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with servers.running(
        command, f"{url}/health", tmp_path_factory.mktemp("server") / "log.txt", seconds=120, cwd=ROOT
    ):
        yield url


def test_lmms_eval_on_a_server(server, own, tmp_path):
    """lmms-eval's OpenAI-compatible back end, by its command line. The table then reads what it wrote."""
    shapes.write(tmp_path / "build" / "evaluation" / "shapes.parquet", SAMPLES)
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "openai",
        "--model_args", f"model={CHECKPOINT},base_url={server}/v1,api_key=none,timeout=600,num_concurrent=1",
        "--tasks", "shapes", "--include_path", str(ROOT / "evaluation" / "lmms_tasks"),
        "--batch_size", "1", "--output_path", str(tmp_path / "results"), "--log_samples",
    ]  # fmt: skip
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = list(tmp_path.glob("results/**/*_samples_shapes.jsonl"))
    assert ran.returncode == 0 and len(found) == 1, ran.stderr[-4000:]  # it may end with 0 after an error
    [path] = found
    samples = sorted(
        map(json.loads, path.read_text(encoding="utf-8").splitlines()), key=lambda sample: sample["doc_id"]
    )
    assert [sample["filtered_resps"].strip() for sample in samples] == [result["given"] for result in own]
    assert [bool(sample["exact_words"]) for sample in samples] == [result["right"] for result in own]
    shapes_row = {"name": "shapes", "lmms-eval": {"task": "shapes", "metric": "exact_words,none"}}
    benchmarks = {"models": {}, "sections": [{"title": "Drawn shapes", "benchmarks": [shapes_row]}]}
    score = table.collect(tmp_path / "results", benchmarks)[CHECKPOINT.name]["shapes", "lmms-eval"]
    assert score.value == pytest.approx(100 * sum(result["right"] for result in own) / SAMPLES)
    assert score.samples == (SAMPLES, SAMPLES) and not score.partial
