"""torch.compile: whole graphs, few of them, equal results."""

import copy

import pytest
import torch
from jina_vlm.compatibility_jina_vlm import CACHE_NAME
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def encode(model, pixel_values, is_last_tile):
    return model.connector(model.vision_model(pixel_values).last_hidden_state, is_last_tile)


def tiles(chat, *sizes):
    inputs = chat([("user", *sizes, "which?")])
    positions = inputs["tile_positions"]
    return inputs["pixel_values"], (positions[:, :2] == positions[:, 2:] - 1).all(dim=1)


@pytest.mark.slow
def test_tower_and_connector_are_one_graph_for_any_number_of_tiles(model, chat):
    """fullgraph, dynamic in tiles: images of 2, 3 and 5 tiles are compiled once."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(encode, fullgraph=True, dynamic=True, backend=counter)
    for sizes in ([(20, 20)], [(113, 500)], [(500, 600)]):
        pixels, is_last = tiles(chat, *sizes)
        with torch.no_grad():
            found = compiled(model.model, pixels, is_last)
        expected = encode(model.model, pixels, is_last)  # with gradients, so all tiles at once here too
        torch.testing.assert_close(found, expected.detach())
    assert counter.frame_count == 1


def test_one_token_after_the_other_without_recompiling(model, chat):
    """Decoding with a static cache: one graph for all steps and all images."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model.forward, fullgraph=True, backend=counter)
    counts = []
    for sizes in ([(20, 20)], [(113, 500)], [(500, 600), (30, 90)]):
        inputs = chat([("user", *sizes, "which?")], add_generation_prompt=True)
        length = inputs["input_ids"].shape[1]
        cache = StaticCache(model.config.get_text_config(), max_cache_len=2400)
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        with torch.no_grad():
            logits = model(**inputs, cache=cache, logits_to_keep=1).logits
            ids = []
            for step in range(6):
                logits[..., model.config.structural_token_ids] = -torch.inf
                ids.append(logits[:, -1].argmax(-1))
                positions = torch.tensor([[length + step]])
                logits = compiled(input_ids=ids[-1][:, None], position_ids=positions, cache=cache).logits
        assert torch.stack(ids, dim=1).tolist() == expected[:, length:].tolist()
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1] <= 2, "the same graphs for other images"


@pytest.mark.parametrize("batch", [1, 2])
def test_generate_compiles_decoding_once(model, chat, batch):
    """`generate` compiles the steps after the prompt by itself, with a static cache on an accelerator; here it is told
    to on the CPU. Answers are those of plain decoding."""
    graphs = []

    def count(graph, inputs):  # a function: `generate` copies its settings, and would count in the copy of an object
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(backend=count, fullgraph=True, mode=None)
    config._compile_all_devices = True
    frames = []
    for sizes in ([(20, 20)], [(113, 500)], [(20, 20), (30, 90)]):
        inputs = chat([[("user", *sizes, "which?")]] * batch, padding=True, add_generation_prompt=True)
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        cache = StaticCache(model.config.get_text_config(), max_cache_len=2400)
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, **{CACHE_NAME: cache}, compile_config=config)
        assert torch.equal(ids, expected)
        frames.append(len(graphs))
    assert 0 < frames[0] == frames[-1] <= 2, frames


@pytest.mark.slow
def test_inductor(model, chat):
    """The backend that `torch.compile` takes by itself, on a tower of two blocks, as each block is compiled anew:
    minutes for a whole one. Other numbers of tiles, and each further token, compile nothing more, and the results are
    those of eager."""
    config = copy.deepcopy(model.config)
    config.vision_config.num_hidden_layers, config.vision_feature_layers = 2, [1, 0]
    torch.manual_seed(0)
    small = type(model)(config).eval()
    compiled_tower = torch.compile(encode, fullgraph=True, dynamic=True)
    compiled_step = torch.compile(small.forward, fullgraph=True)
    graphs = []
    for sizes in ([(20, 20)], [(113, 500)], [(500, 600)]):
        pixels, is_last = tiles(chat, *sizes)
        inputs = chat([("user", *sizes, "which?")], add_generation_prompt=True)
        length = inputs["input_ids"].shape[1]
        cache = StaticCache(config.get_text_config(), max_cache_len=2400)
        with torch.no_grad():
            torch.testing.assert_close(
                compiled_tower(small.model, pixels, is_last), encode(small.model, pixels, is_last)
            )
            whole = small(**inputs).logits
            small(**{**inputs, "input_ids": inputs["input_ids"][:, :-2]}, cache=cache)
            for position in (length - 2, length - 1):
                logits = compiled_step(
                    input_ids=inputs["input_ids"][:, position : position + 1],
                    position_ids=torch.tensor([[position]]),
                    cache=cache,
                ).logits
                torch.testing.assert_close(logits[:, 0], whole[:, position], rtol=0, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1] == graphs[2] <= 4, graphs
