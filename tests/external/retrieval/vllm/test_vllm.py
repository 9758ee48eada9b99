"""vLLM on the base with an adapter for each request, and on the merged folders, offline and as a server."""

import base64
import io
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import requests
import servers
from cases import ALL, CHECKPOINT, DECODER, DENSE, DIMS, MAX_TILES, MULTI, cases
from comparing import same, same_multi_vectors

from jina_vlm_tools.retrieval.inputs import to_chat


NAMES = list(cases())


def cut(vector: np.ndarray, dims: int) -> np.ndarray:
    return vector[:dims] / np.linalg.norm(vector[:dims])


# Offline, an adapter for each request


@pytest.fixture(scope="module")
def llm():
    from vllm import LLM
    from vllm.config import PoolerConfig

    # MEAN is said here: of a generating checkpoint the last token would be taken.
    yield LLM(
        CHECKPOINT, trust_remote_code=True, dtype="float32", max_model_len=4096, enforce_eager=True, runner="pooling",
        pooler_config=PoolerConfig(task="embed", seq_pooling_type="MEAN"), enable_lora=True, max_lora_rank=8,
        # One more than are loaded. On CPUs, a request without an adapter gets what is in the last place, if another
        # request in its batch has one (vLLM's pull request 48421): that place has to be empty.
        max_loras=3,
        # Not the embedding: image tokens pass it too, at other times than text, which its CPU kernels cannot adapt.
        lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        mm_processor_kwargs={"max_tiles": MAX_TILES}, limit_mm_per_prompt={"image": 2},
    )  # fmt: skip


def prompt(name: str) -> dict:
    from transformers import AutoProcessor

    role, content = cases()[name]
    processor = AutoProcessor.from_pretrained(CHECKPOINT, trust_remote_code=True)
    text = processor.apply_chat_template(to_chat(content, role), tokenize=False)
    images = content.get("image")
    return {"prompt": text} | ({"multi_modal_data": {"image": images}} if images else {})


def embed(llm, names: list[str], **kwargs) -> list:
    outputs = llm.embed(
        [prompt(name) for name in names], use_tqdm=False, tokenization_kwargs={"add_special_tokens": False}, **kwargs
    )
    return [output.outputs.embedding for output in outputs]


def test_an_adapter_for_each_request(llm, home, vectors):
    """Without one, as the base; with one, as PEFT; in one batch, and alone."""
    from vllm import PoolingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("retrieval", 1, str(home / DECODER))
    # With the adapter first: images that were seen before are not seen anew.
    for name, found in zip(NAMES, embed(llm, NAMES, lora_request=adapter), strict=True):
        same("vLLM embed, LoRARequest", found, vectors[f"{DECODER}/{name}/dense"])
    for name, found in zip(NAMES, embed(llm, NAMES), strict=True):
        same("vLLM embed, no adapter", found, vectors[f"none/{name}/dense"])
    for name in ("short query", "both"):
        (found,) = embed(llm, [name], lora_request=adapter)
        same("vLLM embed, LoRARequest, alone", found, vectors[f"{DECODER}/{name}/dense"])
    mixed = embed(llm, NAMES, lora_request=[adapter if index % 2 else None for index in range(len(NAMES))])
    for index, (name, found) in enumerate(zip(NAMES, mixed, strict=True)):
        same("vLLM embed, every other with it", found, vectors[f"{(DECODER if index % 2 else 'none')}/{name}/dense"])
    for name, found in zip(NAMES, embed(llm, NAMES, pooling_params=PoolingParams(dimensions=DIMS)), strict=True):
        same("vLLM embed, dimensions", found, cut(vectors[f"none/{name}/dense"], DIMS))
    with pytest.raises(VLLMValidationError, match="only supports Matryoshka dimensions"):
        embed(llm, NAMES[:1], pooling_params=PoolingParams(dimensions=DIMS + 1))


def test_of_an_adapter_the_decoder_s_part_alone_is_applied(llm, home, vectors):
    """The library's limit, which is why adapters of tower and connector are merged: texts are right, images wrong."""
    from vllm.lora.request import LoRARequest

    text, image = embed(llm, ["text", "2 tiles"], lora_request=LoRARequest("all", 2, str(home / ALL)))
    same("vLLM embed, LoRARequest of all parts, text", text, vectors[f"{ALL}/text/dense"])
    assert np.abs(image - vectors[f"{ALL}/2 tiles/dense"]).max() > 1e-3


# Servers of the merged folders


@contextmanager
def serving(folder, log, *arguments):
    port = servers.free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--trust-remote-code",
        "--dtype", "float32", "--max-model-len", "4096", "--enforce-eager", "--runner", "pooling",
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "retrieval",
        "--limit-mm-per-prompt", '{"image": 2}', *arguments,
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with servers.running(command, f"{url}/health", log, seconds=600):
        yield url


def messages(name: str) -> list[dict]:
    """As OpenAI's clients write them."""
    role, content = cases()[name]
    chat = to_chat(content, role)
    for part in chat[1]["content"]:
        if part["type"] == "image":
            file = io.BytesIO()
            part.pop("image").save(file, "PNG")
            uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            part.update(type="image_url", image_url={"url": uri})
    return chat


def post(url: str, path: str, name: str, **fields) -> dict:
    response = requests.post(
        f"{url}{path}", json={"model": "retrieval", "messages": messages(name), **fields}, timeout=600
    )
    assert response.ok, response.text
    return response.json()["data"][0]


def test_server_of_dense_vectors(home, vectors, tmp_path):
    """MEAN and length 1 come from the folder's `modules.json`."""
    with serving(home / DENSE, tmp_path / "log.txt") as url:
        for name in NAMES:
            expected = vectors[f"{ALL}/{name}/dense"]
            same("vLLM /v1/embeddings, messages", post(url, "/v1/embeddings", name)["embedding"], expected)
            short = post(url, "/v1/embeddings", name, dimensions=DIMS)["embedding"]
            same("vLLM /v1/embeddings, dimensions", short, cut(expected, DIMS))
            same("vLLM /pooling, embed", post(url, "/pooling", name)["data"], expected)


def test_server_of_multi_vectors(home, vectors, tmp_path):
    with serving(home / MULTI, tmp_path / "log.txt", "--pooler-config", '{"task": "token_embed"}') as url:
        found = {name: post(url, "/pooling", name)["data"] for name in NAMES}
    same_multi_vectors("vLLM /pooling, token_embed", found, {name: vectors[f"{ALL}/{name}/multi"] for name in NAMES})
