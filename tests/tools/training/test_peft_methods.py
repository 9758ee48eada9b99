"""PEFT's methods: trained a little, saved, loaded again in each way there is, merged, and switched off.

`make test PYTEST_ARGS="-k test_peft_methods.py -rP"` prints the table of docs/training.md.
"""

import copy
from dataclasses import dataclass

import jina_vlm
import pytest
import torch
from conftest import make_image
from miniature import save_miniature
from PIL import Image

from jina_vlm_tools.training import JinaVLMCollator
from jina_vlm_tools.training.lora import target_modules


peft = pytest.importorskip("peft")


@dataclass
class Method:
    config: "peft.PeftConfig"
    trained: str  # in the name of each parameter that is trained
    by_library: bool = True  # whether the model's own `load_adapter` takes it
    keeps_base: bool = True  # in the weights, so that the model without the adapter is what it was


DECODER = target_modules(["decoder"])
TOKENS = [284, 25]  # " User" and ":"
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
PROMPTS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
METHODS = {
    "LoRA, all linear layers": Method(peft.LoraConfig(target_modules="all-linear"), "lora_"),
    "LoRA, layers by name": Method(peft.LoraConfig(target_modules=["q_proj", "v_proj"]), "lora_"),
    "LoRA and the whole connector": Method(
        peft.LoraConfig(target_modules=DECODER, modules_to_save=["connector"]), "lora_|connector.modules_to_save"
    ),
    "LoRA and trained tokens": Method(
        peft.LoraConfig(target_modules=DECODER, trainable_token_indices=TOKENS), "lora_|trainable_tokens_"
    ),
    "DoRA": Method(peft.LoraConfig(target_modules="all-linear", use_dora=True), "lora_", by_library=False),
    "rsLoRA": Method(peft.LoraConfig(target_modules="all-linear", use_rslora=True), "lora_"),
    "PiSSA": Method(
        peft.LoraConfig(target_modules="all-linear", init_lora_weights="pissa"), "lora_", keeps_base=False
    ),
    "VeRA": Method(peft.VeraConfig(target_modules=DECODER, r=8), "vera_lambda_", by_library=False),
    "IA3": Method(peft.IA3Config(**IA3), "ia3_l"),
    "LoHa": Method(peft.LoHaConfig(target_modules=DECODER), "hada_"),
    "LoKr": Method(peft.LoKrConfig(target_modules=DECODER), "lokr_"),
    "OFT": Method(peft.OFTConfig(target_modules=DECODER, oft_block_size=8, use_cayley_neumann=False), "oft_"),
    "Trainable tokens": Method(peft.TrainableTokensConfig(token_indices=TOKENS), "trainable_tokens_"),
    "Prompt tuning": Method(peft.PromptTuningConfig(**PROMPTS), "prompt_encoder", by_library=False),
    "P-tuning": Method(peft.PromptEncoderConfig(**PROMPTS), "prompt_encoder", by_library=False),
    "Prefix tuning": Method(peft.PrefixTuningConfig(**PROMPTS), "prompt_encoder", by_library=False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_miniature(tmp_path_factory.mktemp("miniature"), tile_size=140)


@pytest.fixture
def load(folder):
    return lambda: jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def batch(folder):
    """An image, and text alone."""
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(folder)
    rows = [
        {"images": [Image.fromarray(make_image(100, 150))], "texts": [{"user": "which?", "assistant": "a red star"}]},
        {"images": [], "texts": [{"user": "who?", "assistant": "a blue ring"}]},
    ]
    batch = JinaVLMCollator(processor)(rows)
    with_answers = batch["input_ids"][batch["labels"] != -100].tolist()
    assert len(batch["pixel_values"]) == 2 and with_answers
    return batch


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    return model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


def learn(model, batch, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(steps):
        model.train()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) < steps:
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("name", METHODS)
def test_method(load, batch, tmp_path, name):
    method = METHODS[name]
    model = load()
    before = logits(model, batch)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, method.config)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = learn(model, batch)
    assert losses[-1] < losses[0]
    for parameter_name, parameter in model.named_parameters():
        is_trained = any(part in parameter_name for part in method.trained.split("|"))
        assert parameter.requires_grad == is_trained, parameter_name
        if is_trained:
            assert parameter.grad.isfinite().all(), parameter_name
        else:
            assert parameter.grad is None and torch.equal(parameter, frozen[parameter_name]), parameter_name

    trained = logits(model, batch)
    assert largest(trained[:, -before.shape[1] :] - before) > 1e-3  # behind virtual tokens
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), before) == method.keeps_base
    model.save_pretrained(tmp_path)
    reloaded = largest(logits(peft.PeftModel.from_pretrained(load(), tmp_path), batch) - trained)
    assert reloaded == 0
    by_library = merged = None
    if method.by_library:
        own = load()
        own.load_adapter(str(tmp_path))
        by_library = largest(logits(own, batch) - trained)
        assert by_library == 0
    if not method.config.is_prompt_learning:
        merged = largest(logits(model.merge_and_unload(), batch) - trained)
        assert merged < 1e-5
    print("|", " | ".join([name, *("no" if x is None else f"{x:.0e}" for x in (reloaded, by_library, merged))]), "|")


def test_auto_classes(load, batch, tmp_path):
    """They find the base by the adapter, and its class by the task, or by the package of ours that it is in."""
    for task, auto_class, kwargs in (
        ("CAUSAL_LM", peft.AutoPeftModelForCausalLM, {}),
        (None, peft.AutoPeftModel, {"import_allowlist": ["jina_vlm"]}),
    ):
        torch.manual_seed(0)
        model = peft.get_peft_model(load(), peft.LoraConfig(target_modules=DECODER, task_type=task))
        learn(model, batch)
        model.save_pretrained(tmp_path / str(task))
        found = auto_class.from_pretrained(tmp_path / str(task), dtype=torch.float32, **kwargs)
        assert torch.equal(logits(found, batch), logits(model, batch))
    with pytest.raises(ValueError, match="not in the import allowlist"):
        peft.AutoPeftModel.from_pretrained(tmp_path / "None")


@pytest.mark.parametrize("name", ["LoRA, all linear layers", "Prompt tuning", "P-tuning"])
@torch.no_grad()
def test_answers(load, batch, name):
    """Those of whole forward passes. Virtual tokens need `use_cache=False`: PEFT 0.21 looks for the cache under the
    name that it had before transformers 5.24, and puts them before every step."""
    torch.manual_seed(0)
    config = copy.deepcopy(METHODS[name].config)
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(load(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += torch.randn_like(parameter)
    length = int((batch["labels"][0] != -100).nonzero()[0])
    inputs = {name: batch[name] for name in ("pixel_values", "tile_positions")}
    ids = prompt = batch["input_ids"][:1, :length]
    for _ in range(4):
        scores = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[:, -1]
        scores[:, model.get_base_model().config.structural_token_ids] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    found = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), **inputs, do_sample=False, max_new_tokens=4,
        eos_token_id=None, pad_token_id=0, use_cache=not config.is_prompt_learning,
    )  # fmt: skip
    assert found[0, -4:].tolist() == ids[0, -4:].tolist()
