"""One folder, read by transformers, PEFT, sentence-transformers and mteb: the same vectors."""

import json
import sys

import mteb
import numpy as np
import pytest
import torch
from cases import ALL, CHECKPOINT, DIMS, cases, of_role, shapes
from comparing import max_sim, same, same_multi_vectors
from jina_vlm import JinaVLMForConditionalGeneration
from mteb.models.sentence_transformer_wrapper import MultiVectorWrapper, SentenceTransformerEncoderWrapper
from mteb_pages import PAGES, RELEVANT, Pages
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

from evaluation import mteb_retrieval
from jina_vlm_tools.retrieval.embedder import JinaVLMEmbedder
from jina_vlm_tools.retrieval.folder import merge_folder
from jina_vlm_tools.retrieval.inputs import PROMPTS, prepare, to_chat
from jina_vlm_tools.retrieval.scores import cut, late_scores, pool


FLOAT32 = {"trust_remote_code": True, "model_kwargs": {"dtype": torch.float32}, "device": "cpu"}


def as_input(content: dict):
    """What users of sentence-transformers pass."""
    images, text = content.get("image", []), content.get("text")
    if not images:
        return text
    if len(images) > 1:
        return to_chat(content, "document")[1:]
    return {"image": images[0], "text": text} if text else images[0]


@pytest.fixture(scope="module")
def dense(home):
    """The library keeps no prompts of a folder for multi-vectors that it opens as one for dense vectors."""
    return SentenceTransformer(str(home / ALL), prompts=PROMPTS, **FLOAT32)


@pytest.fixture(scope="module")
def multi(home):
    return MultiVectorEncoder(str(home / ALL), **FLOAT32)


# transformers and PEFT


@pytest.mark.parametrize("role", ["query", "document"])
def test_alone_is_as_in_a_batch(reference, vectors, role):
    names = of_role(role)
    dense, multi = reference.embed(names)
    for index, name in enumerate(names):
        same("PEFT, in a batch, dense", dense[index], vectors[name][0])
        same("PEFT, in a batch, multi", multi[index], vectors[name][1])


def test_the_vectors_tell_inputs_apart(vectors, reference):
    """So that equality means something: far from each other, and from those of the plain model."""
    plain = dict.fromkeys(vectors)
    with reference.model.disable_adapter():
        plain = reference.vectors()
    dense = np.stack([one for one, _ in vectors.values()])
    between = np.abs(dense[:, None] - dense[None]).max(-1)
    assert between[~np.eye(len(dense), dtype=bool)].min() > 1e-2
    assert min(np.abs(vectors[name][0] - plain[name][0]).max() for name in vectors) > 1e-2


def test_auto_classes(home, vectors, reference):
    """The model without its head, whose names lack a prefix; the processor with its own number of tiles."""
    model = AutoModel.from_pretrained(home / ALL, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(home / ALL, trust_remote_code=True)
    for name, (role, content) in cases().items():
        inputs = prepare(processor, [content], role)
        with torch.no_grad():
            states = model(**inputs).last_hidden_state
        same("AutoModel, dense", cut(pool(states, inputs["attention_mask"]))[0], vectors[name][0])
        same("AutoModel, multi", F.normalize(reference.found.projector(states[0]), dim=-1).detach(), vectors[name][1])


@torch.no_grad()
def test_load_adapter_on_the_generating_model(home, vectors, reference):
    model = JinaVLMForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    model.load_adapter(str(home / ALL))
    for name, (role, content) in cases().items():
        inputs = prepare(reference.processor, [content], role)
        states = model.model(**inputs).last_hidden_state
        same("load_adapter, dense", cut(pool(states, inputs["attention_mask"]))[0], vectors[name][0])


QUESTION = [
    {"role": "user", "content": [{"type": "image", "image": shapes(1)}, {"type": "text", "text": "What is it?"}]}
]


def answer(model, processor) -> list[int]:
    inputs = processor.apply_chat_template(
        QUESTION, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist()


def test_with_the_adapter_off_it_generates_as_before(home, reference):
    plain = JinaVLMForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    expected = answer(plain, reference.processor)
    assert answer(reference.model, reference.processor) != expected
    with reference.model.disable_adapter():
        assert answer(reference.model, reference.processor) == expected
    embedder = JinaVLMEmbedder.from_pretrained(home / ALL, dtype=torch.float32)
    embedder.embed(["a red circle"], role="query")
    assert answer(embedder.model, reference.processor) == expected


def test_our_embedder(home, vectors):
    embedder = JinaVLMEmbedder.from_pretrained(home / ALL, dtype=torch.float32)
    for role in ("query", "document"):
        names = of_role(role)
        found = embedder.embed([cases()[name][1] for name in names], role=role, kind="both")
        short = embedder.embed([cases()[name][1] for name in names], role=role, dims=DIMS)
        for index, name in enumerate(names):
            same("JinaVLMEmbedder, dense", found.dense[index], vectors[name][0])
            same("JinaVLMEmbedder, multi", found.multi[index], vectors[name][1])
            same("JinaVLMEmbedder, dense, cut", short.dense[index], cut(torch.tensor(vectors[name][0]), DIMS))


# sentence-transformers


@pytest.mark.parametrize("role", ["query", "document"])
def test_sentence_transformer(dense, vectors, role):
    encode = {"query": dense.encode_query, "document": dense.encode_document}[role]
    names = of_role(role)
    for name in names:
        same("SentenceTransformer", encode(as_input(cases()[name][1]), normalize_embeddings=True), vectors[name][0])
    chats = [to_chat(cases()[name][1], role)[1:] for name in names]
    batch = encode(chats, normalize_embeddings=True, batch_size=len(chats))
    short = encode(chats, normalize_embeddings=True, batch_size=2, truncate_dim=DIMS)
    for index, name in enumerate(names):
        same("SentenceTransformer, in a batch", batch[index], vectors[name][0])
        same("SentenceTransformer, cut", short[index], cut(torch.tensor(vectors[name][0]), DIMS))


@pytest.mark.parametrize("role", ["query", "document"])
def test_multi_vector_encoder(multi, vectors, role):
    encode = {"query": multi.encode_query, "document": multi.encode_document}[role]
    names = of_role(role)
    for name in names:
        same("MultiVectorEncoder", encode(as_input(cases()[name][1])), vectors[name][1])
    batch = encode([to_chat(cases()[name][1], role)[1:] for name in names], batch_size=len(names))
    for index, name in enumerate(names):
        same("MultiVectorEncoder, in a batch", batch[index], vectors[name][1])


def test_texts_images_and_both_in_one_batch(dense, vectors):
    names = ["text", "2 tiles", "5 tiles", "both"]
    batch = dense.encode_document([as_input(cases()[name][1]) for name in names], normalize_embeddings=True)
    for index, name in enumerate(names):
        same("SentenceTransformer, mixed batch", batch[index], vectors[name][0])


def test_without_its_prompts_it_embeds_something_else(home, dense):
    found = SentenceTransformer(str(home / ALL), **FLOAT32).encode_query("a red circle")
    assert not np.allclose(found, dense.encode_query("a red circle"), atol=1e-2)


def test_scores(multi, vectors):
    """The library sums over a query's tokens, ours is the mean: "meanmaxsim" there."""
    queries, documents = ([torch.tensor(vectors[name][1]) for name in of_role(role)] for role in ("query", "document"))
    pad = torch.nn.utils.rnn.pad_sequence
    padded = [pad(one, batch_first=True) for one in (queries, documents)]
    masks = [pad([torch.ones(len(one)) for one in many], batch_first=True) for many in (queries, documents)]
    ours = late_scores(padded[0], masks[0], padded[1], masks[1])
    lengths = torch.tensor([len(one) for one in queries])[:, None]
    same("MaxSim, divided by the query's tokens", multi.similarity(queries, documents) / lengths, ours)


@pytest.mark.parametrize("kind", ["dense", "multi"])
def test_merged(home, vectors, kind, tmp_path):
    place = str(merge_folder(home / ALL, tmp_path / kind, kind, dtype="float32"))
    model = (SentenceTransformer if kind == "dense" else MultiVectorEncoder)(place, **FLOAT32)
    encode = {"query": model.encode_query, "document": model.encode_document}
    found = {name: encode[role](as_input(content)) for name, (role, content) in cases().items()}
    if kind == "multi":
        same_multi_vectors("merged, multi", found, {name: multi for name, (_, multi) in vectors.items()})
    for name in found if kind == "dense" else ():
        same("merged, dense", found[name], vectors[name][0])


def test_a_dense_folder_has_no_projector_to_open(home, tmp_path):
    """What the library makes of it is random, and it says so at info level alone. Why the multi-vector folder is the
    one to publish."""
    place = str(merge_folder(home / ALL, tmp_path / "dense", "dense", dtype="float32"))
    first, second = (MultiVectorEncoder(place, **FLOAT32).encode_query("a red circle") for _ in range(2))
    assert not torch.allclose(first, second, atol=0.1)


# mteb


@pytest.mark.parametrize("kind", ["dense", "multi"])
def test_mteb(dense, multi, vectors, kind, tmp_path):
    """The harness's own search: the score of each query with each page."""
    wrap, model = {
        "dense": (SentenceTransformerEncoderWrapper, dense),
        "multi": (MultiVectorWrapper, multi),
    }[kind]
    wrapped = wrap(model)
    # It takes models of sentence-transformers for ones of texts.
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(
        update={"name": f"drawn/{kind}", "revision": "0", "modalities": ["text", "image"]}
    )
    results = mteb.evaluate(
        wrapped, Pages(), cache=None, prediction_folder=tmp_path, show_progress_bar=False, co2_tracker=False
    )
    (file,) = tmp_path.rglob("*DrawnPages*.json")
    found = json.loads(file.read_text())["default"]["test"]
    for query in of_role("query"):
        tokens = len(vectors[query][1]) if kind == "multi" else 1  # the library sums over them
        for page in PAGES:
            score = (
                vectors[query][0] @ vectors[page][0]
                if kind == "dense"
                else max_sim(vectors[query][1], vectors[page][1])
            )
            same(f"mteb, {kind}, scores", found[query][page] / tokens, score)
    # Of equal scores, trec_eval puts the last name first.
    hits = [max(pages, key=lambda page: (pages[page], page)) == RELEVANT[query] for query, pages in found.items()]
    assert results.task_results[0].scores["test"][0]["hit_rate_at_1"] == np.mean(hits), found


def test_drawn_pages_are_a_task_of_mteb(monkeypatch, capsys):
    monkeypatch.setattr(mteb_retrieval.DrawnPages, "pages", 12)
    monkeypatch.setattr(mteb_retrieval.DrawnPages, "asked", 24)
    monkeypatch.setattr(sys, "argv", ["mteb_retrieval", "checkpoints/tiny-retrieval"])
    mteb_retrieval.main()
    name, score = capsys.readouterr().out.strip().split(": ")
    assert name == "DrawnPagesRetrieval" and float(score) > 85  # chance: about 40
