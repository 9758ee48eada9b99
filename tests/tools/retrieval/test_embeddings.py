"""Vectors: cut, quantized, compared, written and read again."""

import json
import math
import os
import stat

import pytest
import torch
from conftest import largest_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from jina_vlm_tools.retrieval import scores
from jina_vlm_tools.retrieval.embeddings import Embeddings, join
from jina_vlm_tools.retrieval.scores import late_scores, max_sim
from jina_vlm_tools.retrieval.token_pooling import pool_tokens


@pytest.fixture
def made() -> Embeddings:
    torch.manual_seed(0)
    multi = [F.normalize(torch.randn(length, 16), dim=-1) for length in (3, 7, 1, 5)]
    return Embeddings(F.normalize(torch.randn(4, 32), dim=-1), multi)


def by_hand(query: torch.Tensor, document: torch.Tensor) -> float:
    return sum(max(float(token @ other) for other in document) for token in query)


def test_late_interaction_is_the_sum_of_best_matches(made):
    expected = torch.tensor([[by_hand(query, document) for document in made.multi] for query in made.multi])
    assert torch.allclose(made.score(made), expected, atol=1e-6)


def test_documents_are_compared_in_pieces_that_fit_into_memory(made, monkeypatch):
    whole = made.score(made)
    monkeypatch.setattr(scores, "CHUNK", 8)
    assert torch.allclose(made.score(made), whole, atol=1e-6)


def test_padding_does_not_count(made):
    padded = torch.nn.utils.rnn.pad_sequence(made.multi, batch_first=True, padding_value=5.0)
    mask = torch.tensor([[index < len(one) for index in range(7)] for one in made.multi])
    lengths = mask.sum(1, keepdim=True)
    assert torch.allclose(late_scores(padded, mask, padded, mask) * lengths, made.score(made), atol=1e-6)
    offsets = torch.tensor([0, 3, 10, 11, 16])
    assert torch.allclose(max_sim(made.multi[1], torch.cat(made.multi), offsets) * 7, made.score(made)[1], atol=1e-6)


def test_dense_vectors_are_compared_by_their_cosine_and_cut(made):
    dense = Embeddings(made.dense)
    assert torch.allclose(dense.score(dense), made.dense @ made.dense.T)
    cut = dense.truncate(8)
    assert cut.dense.shape == (4, 8)
    assert torch.allclose(cut.dense, F.normalize(made.dense[:, :8], dim=-1))
    assert torch.allclose(cut.dense.norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize(("precision", "bytes_each", "error"), [("int8", 1, 0.02), ("binary", 1 / 8, 0.6)])
def test_quantized_vectors_are_smaller_and_near(made, precision, bytes_each, error):
    small = made.quantize(precision)
    assert small.dense.element_size() * small.dense.shape[1] == 32 * bytes_each
    assert small.multi[1].element_size() * small.multi[1].shape[1] == 16 * bytes_each
    back = small.restore()
    assert torch.allclose(back.dense.norm(dim=-1), torch.ones(4))
    assert (1 - (back.dense * made.dense).sum(-1)).max() < error
    assert torch.equal(back.dense.sign(), made.dense.sign()) or precision == "int8"
    assert torch.equal(made.score(small), made.score(back))


def test_signs_are_packed_from_the_highest_bit_down():
    vector = torch.tensor([[1.0, -1, -1, -1, -1, -1, -1, 2]])
    assert Embeddings(vector).quantize("binary").dense.tolist() == [[0b10000001]]


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_files_hold_what_was_saved(made, tmp_path, precision):
    small = made.quantize(precision)
    small.save(tmp_path / "made.safetensors")
    read = Embeddings.load(tmp_path / "made.safetensors")
    assert read.precision == precision and torch.equal(read.dense, small.dense)
    assert all(torch.equal(one, other) for one, other in zip(read.multi, small.multi, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["made.safetensors"]


def test_a_full_disk_and_an_interruption_leave_the_file_before(made, tmp_path, monkeypatch):
    made.save(tmp_path / "made.safetensors")
    before = (tmp_path / "made.safetensors").read_bytes()

    def interrupt(_) -> None:
        raise KeyboardInterrupt

    with largest_file(100), pytest.raises(OSError, match="too large"):
        made.save(tmp_path / "made.safetensors")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.save(tmp_path / "made.safetensors")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"made.safetensors": before}


def test_a_folder_that_cannot_be_synced_is_closed(made, tmp_path, monkeypatch):
    def refuse_folders(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError("no fsync of folders here")

    monkeypatch.setattr(os, "fsync", refuse_folders)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="no fsync of folders"):
        made.save(tmp_path / "made.safetensors")
    assert os.listdir("/proc/self/fd") == before


def test_files_of_others_and_damaged_ones_are_refused(made, tmp_path):
    save_file({"dense": made.dense}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other tensors than embeddings"):
        Embeddings.load(tmp_path / "other.safetensors")
    made.save(tmp_path / "made.safetensors")
    whole = (tmp_path / "made.safetensors").read_bytes()
    (tmp_path / "made.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="damaged"):
        Embeddings.load(tmp_path / "made.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        Embeddings.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"lengths": torch.tensor([3, 7, 1, 6])}, {}),
        ({"lengths": torch.ones(4)}, {}),
        ({"multi": None}, {}),
        ({}, {"precision": None}),
        ({}, []),
    ],
)
def test_files_that_contradict_themselves_are_refused(made, tmp_path, changes, about):
    file = tmp_path / "made.safetensors"
    made.save(file)
    with safe_open(file, "pt") as opened:
        known = json.loads(opened.metadata()["jina_vlm"])
    tensors = {name: tensor for name, tensor in (load_file(file) | changes).items() if tensor is not None}
    save_file(tensors, file, {"jina_vlm": json.dumps(about if isinstance(about, list) else known | about)})
    with pytest.raises(ValueError, match="made.safetensors is no file of embeddings, or a damaged one"):
        Embeddings.load(file)


def test_some_are_taken_and_joined_in_the_order_asked_for(made):
    chosen = join([made[[2, 0]], made[1], made[3:]])
    assert torch.equal(chosen.dense, made.dense[[2, 0, 1, 3]])
    assert [len(one) for one in chosen.multi] == [1, 3, 7, 5]
    assert len(made[1:3]) == 2


def test_what_cannot_be_compared_or_cut_is_refused(made):
    with pytest.raises(ValueError, match="embed both as the same kind"):
        Embeddings(made.dense).score(Embeddings(multi=made.multi))
    with pytest.raises(ValueError, match="32 numbers, documents of 8"):
        Embeddings(made.dense).score(Embeddings(made.dense).truncate(8))
    with pytest.raises(ValueError, match="from 1 to 32"):
        made.truncate(33)
    with pytest.raises(ValueError, match="Cut before"):
        made.quantize("int8").truncate(8)
    with pytest.raises(ValueError, match="already"):
        made.quantize("int8").quantize("binary")
    with pytest.raises(ValueError, match="int4"):
        made.quantize("int4")
    with pytest.raises(ValueError, match="multiples of 8"):
        Embeddings(made.dense[:, :7]).quantize("binary")


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
def test_pooled_tokens_are_fewer_and_stand_for_all(factor):
    """Three bundles of directions: pooled to three, each is the mean of one bundle."""
    torch.manual_seed(0)
    middles = F.normalize(torch.randn(3, 16), dim=-1)
    tokens = F.normalize(middles.repeat_interleave(8, 0) + 0.01 * torch.randn(24, 16), dim=-1)
    pooled = pool_tokens(tokens, factor)
    assert len(pooled) == math.ceil(24 / factor)
    assert torch.allclose(pooled.norm(dim=-1), torch.ones(len(pooled)))
    assert ((tokens @ pooled.T).amax(1) > 0.99).all()
    if factor == 1:
        assert torch.equal(pooled, tokens)
