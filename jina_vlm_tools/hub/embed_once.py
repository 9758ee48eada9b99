"""Run by `embedding.py` in a process of its own, which knows nothing of this repository: embed a text and a drawn
image, print as JSON what came of it.

    embed_once.py FOLDER BASE       a retrieval folder whose adapter names BASE: each library by its own code
    embed_once.py MERGED FOLDER     a merged folder, compared with the retrieval folder that it was made of
"""

import json
import sys
from pathlib import Path


sys.modules["jina_vlm"] = None  # an import of the package fails: only the folder's own code may be run

import torch  # noqa: E402
from peft import PeftModel, get_peft_model_state_dict  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sentence_transformers import MultiVectorEncoder, SentenceTransformer  # noqa: E402
from torch.nn.functional import normalize  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402


MAX_NEW_TOKENS = 8
SETTINGS = "config_sentence_transformers.json"
TEXT, IMAGE = "a red circle", Image.new("RGB", (240, 180), "white")
ImageDraw.Draw(IMAGE).ellipse((70, 40, 170, 140), fill="red")


def encode(kind: str, folder: str) -> list[torch.Tensor]:
    """By sentence-transformers: [vectors, width] of the text and of the image."""
    encoder = {"multi": MultiVectorEncoder, "dense": SentenceTransformer}[kind](
        folder,
        prompts=read(folder, SETTINGS)["prompts"],
        trust_remote_code=True,
        model_kwargs={"dtype": "auto"},
        device="cpu",
    )
    code.add(type(encoder[0].model).__module__.split(".")[0])
    found = encoder.encode_query([TEXT])[0], encoder.encode_document([IMAGE])[0]
    return [normalize(torch.atleast_2d(torch.as_tensor(vectors)).float(), dim=-1) for vectors in found]


def read(folder: str, name: str) -> dict:
    return json.loads(Path(folder, name).read_text())


def cosine(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Of vectors of length 1, or of 0 alike: the mean over an input, as bfloat16 moves single ones, of the input
    where it is less."""
    if [one.shape for one in some] != [other.shape for other in others]:
        return 0.0
    return min(1 - (one - other).square().sum(-1).mean().item() / 2 for one, other in zip(some, others, strict=True))


def by_peft(folder: str, base: str) -> dict:
    """Of the generating model: its vectors with the adapter and without, its answers without one and with one that is
    off."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    plain, loaded = AutoModelForImageTextToText.from_pretrained(
        base, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    projector = load_file(Path(folder, "1_Dense", "model.safetensors"))["linear.weight"].float()
    code.update(type(part).__module__.split(".")[0] for part in (plain, processor, processor.image_processor))

    def run(*turns: tuple[str, dict], **kwargs) -> dict:
        chat = [{"role": role, "content": [part]} for role, part in turns]
        return processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)

    @torch.no_grad()
    def embed(model) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        dense, multi = [], []
        for prompt, part in (
            ("query", {"type": "text", "text": TEXT}),
            ("document", {"type": "image", "image": IMAGE}),
        ):
            system = {"type": "text", "text": read(folder, SETTINGS)["prompts"][prompt]}
            states = (
                model.model(**run(("system", system), ("user", part)), use_cache=False).last_hidden_state[0].float()
            )
            dense.append(normalize(states.mean(0, keepdim=True), dim=-1))
            multi.append(normalize(states @ projector.T, dim=-1))
        return dense, multi

    def answer(model) -> torch.Tensor:
        inputs = run(("user", {"type": "image", "image": IMAGE}), add_generation_prompt=True)
        ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return ids[0, inputs["input_ids"].shape[1] :]

    before, expected = embed(plain.eval()), answer(plain)
    adapted = PeftModel.from_pretrained(plain, folder).eval()
    dense, multi = embed(adapted.get_base_model())
    with adapted.disable_adapter():
        is_as_before = torch.equal(answer(adapted), expected)
    there = get_peft_model_state_dict(adapted)
    in_file = load_file(Path(folder, "adapter_model.safetensors"))
    return {
        "dense": dense,
        "multi": multi,
        "unloaded": sorted(in_file.keys() ^ there.keys()),
        "changes": 1 - cosine(dense, before[0]),
        "answer": processor.decode(expected, skip_special_tokens=True).strip(),
        "answers_as_before": is_as_before,
        "faults": {name: sorted(map(str, keys)) for name, keys in loaded.items() if keys},
    }


code: set[str] = set()  # of which packages what was loaded is
folder, other = sys.argv[1:]
if Path(other, "adapter_config.json").is_file():
    kind = "multi" if read(folder, SETTINGS)["model_type"] == "MultiVectorEncoder" else "dense"
    vectors = encode(kind, folder)
    result = {kind: vectors, "agreement": {kind: cosine(vectors, encode(kind, other))}}
else:
    result = by_peft(folder, other)
    result["agreement"] = {kind: cosine(result[kind], encode(kind, folder)) for kind in ("dense", "multi")}
shapes = {kind: [list(vectors.shape) for vectors in result.pop(kind)] for kind in ("dense", "multi") if kind in result}
print(json.dumps({**result, "shapes": shapes, "code": sorted(code)}))
