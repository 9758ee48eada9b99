"""The benchmarks compare what they say they compare, and the report shows what was measured. No times are tested."""

import mmap
import sys

import pytest
import torch
from jina_vlm import JinaVLMConfig, JinaVLMForConditionalGeneration, JinaVLMImageProcessor, JinaVLMProcessor
from jina_vlm.modeling_jina_vlm import JinaVLMVisionModel
from PIL import Image
from transformers import Qwen3VLConfig

from benchmarks import (
    batches,
    decoder,
    distinct_tiles,
    efficiency,
    full_model,
    growth,
    peer,
    preprocessing,
    report,
    results,
    side_by_side,
    tower,
    training_memory,
    training_step,
)
from jina_vlm_tools.files import TINY as CHECKPOINT  # noqa: E402


pytestmark = pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="checkpoints/tiny has not been trained yet")


@pytest.fixture(scope="module")
def small():
    return JinaVLMForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tiny_processor():
    return JinaVLMProcessor.from_pretrained(CHECKPOINT)


def test_turns():
    """Every case runs once before, and then once a round, beginning with another one each time."""
    calls = []
    seconds = side_by_side.take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=2)
    assert "".join(calls) == "abc" + "abc" + "bca"
    assert all(len(times) == 2 for times in seconds.values())
    assert side_by_side.ratio({"one": [1.0, 9.0, 4.0], "other": [2.0, 3.0, 4.0]}, "one", "other") == 1.0


def test_memory_is_seen_to_rise():
    """In pages of its own: an allocator may have room left from earlier tests. The system may reclaim some."""
    size = 2**28
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages, side_by_side.Peak() as peak:
        for page in range(0, size, mmap.PAGESIZE):
            pages[page] = 1
    assert 0.7 * size <= peak.bytes < 2 * size


def test_straight_torch_calls_make_the_same_tiles(monkeypatch):
    """But for rounding: they take another of torch's kernels."""
    monkeypatch.setattr(preprocessing, "SIZES", {"small": (300, 420), "wide": (300, 1200)})
    tiler, image = JinaVLMImageProcessor(), preprocessing.draw("wide")
    ours = tiler(image, return_tensors="pt")["pixel_values"]
    assert (preprocessing.straight(tiler, image) - ours).abs().max() <= 2 / 255
    threads = torch.get_num_threads()
    try:
        row = preprocessing.measure(["small", "wide"], threads=1, rounds=1)
    finally:
        torch.set_num_threads(threads)
    assert row["image"] == preprocessing.ALL and row["tiles"] == len(
        tiler([preprocessing.draw(n) for n in preprocessing.SIZES])["pixel_values"]
    )
    assert "| all five |" in preprocessing.table([row])
    assert row["without_fit_to_ours"] > 0 and "`do_resize=False`, ms" in preprocessing.table([row])


@torch.no_grad()
def test_plain_pooling_is_the_connectors(small):
    config = JinaVLMConfig.from_pretrained(CHECKPOINT)
    ours, plain = tower.SeeingHalf(config).double().eval(), tower.Plain(config).double().eval()
    for half, whole in ((ours.vision_model, small.model.vision_model), (ours.connector, small.model.connector)):
        half.load_state_dict(whole.state_dict())
    state = small.model.connector.state_dict()
    plain.tower.load_state_dict(small.model.vision_model.tower.state_dict(), strict=False)
    plain.query.load_state_dict({part: state[f"q_proj.{part}"] for part in ("weight", "bias")})
    plain.key_value.load_state_dict(
        {part: torch.cat([state[f"k_proj.{part}"], state[f"v_proj.{part}"]]) for part in ("weight", "bias")}
    )
    plain.out.load_state_dict({part: state[f"out_proj.{part}"] for part in ("weight", "bias")})
    plain.gate_up.weight.copy_(torch.cat([state["gate_proj.weight"], state["up_proj.weight"]]))
    plain.down.weight.copy_(state["down_proj.weight"])
    pixels = torch.rand(3, 3, 378, 378, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    torch.testing.assert_close(plain(pixels), ours(pixels), rtol=1e-6, atol=1e-6)


def test_tower_is_measured():
    config = JinaVLMConfig.from_pretrained(CHECKPOINT)
    ours, plain = (
        full_model.build(lambda kind=kind: kind(config), torch.bfloat16, "cpu")
        for kind in (tower.SeeingHalf, tower.Plain)
    )
    row = tower.measure(2, 1, ours, plain, config, "cpu")
    assert set(row["seconds"]) == {"ours", "library", "products", "attention", "limit"}
    assert tower.table([{**row, "memory": {"ours": 1, "library": 2}}]).count("\n") == 2


def test_distinct_tiles_are_counted_and_timed(tmp_path):
    """A drawn page, and a real PDF's where pypdfium2 is installed: a white one's tiles are all the same."""
    config = JinaVLMConfig.from_pretrained(CHECKPOINT)
    vision = full_model.build(lambda: JinaVLMVisionModel(config), torch.bfloat16, "cpu")
    images = distinct_tiles.images()
    one = distinct_tiles.measure("300 x 300", images["300 x 300"], vision, 1, "cpu")
    assert (one["tiles"], one["distinct"], one["difference"]) == (2, 1, 0)
    page = JinaVLMImageProcessor()(images["A4 page, text in its upper third"], return_tensors="pt")["pixel_values"]
    assert len(page) == 13 and len({tile.numpy().tobytes() for tile in page}) == 8
    counted = [{"file": "a.pdf", "pages": 2, "tiles": 26, "distinct": 13}]
    assert "13 of 26 tiles (50.0%) are not computed" in distinct_tiles.table([one, distinct_tiles.total(counted)])
    pytest.importorskip("pypdfium2")
    Image.new("RGB", (827, 1169), "white").save(tmp_path / "white.pdf")
    assert distinct_tiles.count(tmp_path / "white.pdf", 3) == {
        "file": "white.pdf",
        "pages": 1,
        "tiles": 13,
        "distinct": 1,
    }


@torch.no_grad()
def test_the_text_model_has_the_same_weights(small):
    text, ids = full_model.text_model(small), torch.arange(100, 120)[None]
    torch.testing.assert_close(text(input_ids=ids).logits, small(input_ids=ids).logits)
    assert text.lm_head.weight is small.lm_head.weight


def test_the_large_model_knows_the_small_processors_images(tiny_processor):
    config = full_model.small_tokenizers_config()
    inputs = tiny_processor(
        text=tiny_processor.image_token, images=[Image.new("RGB", (378, 378))], return_tensors="pt"
    )
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(config.image_token_id) == 392 and set(config.structural_token_ids) & set(ids)
    assert config.text_config.hidden_size == 2048


def test_prompts_are_the_processors(small, tiny_processor):
    """Structural tokens and all."""
    image = Image.new("RGB", (1920, 1080))
    ids, features = decoder.prompt(small, images=2, rows=3, columns=4, text_tokens=0)
    expected = tiny_processor(text=tiny_processor.image_token * 2, images=[image, image], return_tensors="pt")[
        "input_ids"
    ]
    assert torch.equal(ids, expected[:, -ids.shape[1] :])
    assert [len(part) for part in features["image"].pooler_output] == [196 + 34 * 44 + 0 * 1] * 2


def test_decoding_leaves_the_cache_as_it_was(small):
    text = full_model.text_model(small)
    row = decoder.decode(small, text, length=100, tokens=2, rounds=1, device="cpu")
    assert set(row["seconds"]) == {"ours", "text", "limit"} and row["to_limit"] > 0
    cache = decoder.noise_cache(small.config.text_config, 100, "cpu", torch.float32)
    assert cache.get_seq_length() == 100
    rows = [row, decoder.prefill(small, text, "prefill", 1, "cpu", images=1, rows=1, columns=1, text_tokens=3)]
    assert rows[1]["tokens"] == 424 + 3
    assert decoder.table(rows).count("\n") == 3


def test_no_tile_twice_and_none_for_padding(small, tiny_processor, monkeypatch):
    monkeypatch.setattr(batches, "BATCHES", (1, 3))
    monkeypatch.setattr(batches, "NEW_TOKENS", 2)
    rows = batches.measure(batches.Answerer(small, tiny_processor), 1, "cpu")
    assert [row["tiles"] for row in rows] == [row["needed"] for row in rows] and len(rows) == 5
    assert rows[0]["to_one_by_one"] == 1 and rows[0]["padding"] == 0 < rows[1]["padding"] < 1
    assert batches.table(rows).count("\n") == 1 + len(rows)


def test_what_pooling_saves(monkeypatch):
    monkeypatch.setattr(efficiency, "GRIDS", ((3, 4),))
    (row,) = efficiency.rows()
    assert (row["pooled"]["tokens"], row["pooled"]["image_tokens"]) == (1744, 196 + 34 * 44)
    assert row["unpooled"]["image_tokens"] == 729 + 65 * 84
    # 28 layers of 8 heads for keys and as many for values, 128 numbers of two bytes each
    assert row["pooled"]["cache"] == 1744 * 28 * 2 * 8 * 128 * 2
    # Twice the decoder's weights for each token, and what attention adds
    weights = 28 * (2048 * 4096 + 2048 * 2048 + 3 * 2048 * 6144)
    attention = 28 * 4 * 1744**2 * 2048
    assert row["pooled"]["prefill"] == pytest.approx(2 * 1744 * weights + attention, rel=0.01)


def test_the_papers_figures_follow_from_its_rules(monkeypatch):
    """Tokens exactly; the cache, of 16 heads, to the last digit; operations within 1.5 %; its ratios."""
    monkeypatch.setattr(efficiency, "GRIDS", ((3, 4),))
    (row,) = efficiency.rows()
    rules, paper = row["by_papers_rules"], efficiency.PAPER
    for kind in ("pooled", "unpooled"):
        assert rules[kind]["tokens"] == paper[kind]["tokens"]
        assert round(rules[kind]["papers_cache"] / 1e9, 2) == paper[kind]["cache"] / 1e9
        assert rules[kind]["prefill"] == pytest.approx(paper[kind]["prefill"], rel=0.015)
        assert rules[kind]["cache"] == rules[kind]["tokens"] * 28 * 2 * 8 * 128 * 2
        assert row[kind]["tokens"] < paper[kind]["tokens"], "overlaps are dropped"
    assert {name: round(rules["times"][name], 1) for name in paper["times"]} == paper["times"]
    printed = efficiency.table([row])
    assert "| 9,477 / 2,366 = 4.0 | 27.2 / 6.9 = 3.9 | 2.12 / 0.53 = 4.0 | not stated = 2.3 |" in printed
    assert "| 6,285 / 1,744 = 3.6 | 26.8 / 5.6 = 4.8 | 0.72 / 0.20 = 3.6 | 35.5 / 13.9 = 2.6 |" in printed


def test_a_training_step():
    row = training_step.small(rounds=1)
    assert row["to_parts"] > 0 and row["tokens"] > row["tiles"] > 2
    assert training_step.table([row]).count("\n") == 2


def test_stages_of_an_answer(small, tiny_processor):
    row = growth.Stages(small, tiny_processor, "cpu").run([(378, 378), (300, 500)], 2)
    assert row["tokens"] > 2 * 424 and row["tiles"] == 2 + 3 and list(row["seconds"]) == list(growth.STAGES)


def test_the_peer_answers():
    text = {
        **peer.TEXT,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    config = Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True)
    answered = peer.Peer(dtype=torch.float32, config=config).first_token(preprocessing.noise(480, 640), 3)
    # 640 x 480 pixels, in windows of 32 x 32, between two marks
    assert answered["tokens"] == 20 * 15 + 2 + 3 and answered["seconds"] > 0


def test_the_report_shows_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert results.load("growth") is None
    row = {
        "grows": "image",
        "at": "378 x 378",
        "tiles": 2,
        "tokens": 424,
        "answer_tokens": 0,
        "seconds": dict.fromkeys(growth.STAGES, 1.25),
    }
    row["peer"] = {"tokens": 146, "seconds": 2.5}
    results.save("growth", [row])
    assert "| image | 378 x 378 | 2 | 424 | 1.25 | 1.25 | 1.25 | 1.25 | 5.0 | 146 | 2.5 |" in report.page()
    assert len([axes for axes in report.draw().axes if axes.axison]) == 3


def test_a_command_runs_elsewhere_too(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    options = ["--folder", str(tmp_path), "--cases", "Q4_K_M torch", "Q8_0 torch"]
    monkeypatch.setattr(sys, "argv", ["llama_cpp.py", *options])
    results.save("llama_cpp", [])
    expected = "python -m benchmarks.llama_cpp --cases 'Q4_K_M torch' 'Q8_0 torch'"
    assert results.load("llama_cpp")["command"] == expected


def test_the_committed_report_is_of_the_committed_results():
    """Run `python -m benchmarks.report` after a benchmark."""
    assert report.PAGE.read_text(encoding="utf-8") == report.page()
    assert report.FIGURE.is_file() and (report.PAGE.parent / report.link(report.PAGE, report.FIGURE)).samefile(
        report.FIGURE
    )
    assert report.summary() in report.page()


def test_what_training_takes():
    """Of a layer torch keeps its input and its output's, never its weights; of adapters all are in float32."""
    with torch.device("meta"):
        block = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh())
        inputs = torch.empty(4, 8, requires_grad=True)
    assert training_memory.kept(block, lambda: block(inputs)) == 4 * (8 + 16) * 4
    (kind,) = [kind for kind in training_memory.KINDS if kind.sampled]
    counted = training_memory.count(efficiency.meta_model(2).train(), kind)
    assert counted["weights"] == 2 * 2_450_807_760 and counted["trained"] == 16 * 17_999_872
    assert counted["cache"] == 64 * (814 + 300) * 28 * 2 * 8 * 128 * 2
