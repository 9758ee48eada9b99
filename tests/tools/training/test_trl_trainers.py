"""TRL's trainers as they are installed, with images and without: what they compute of each answer is what one pass
over it alone gives, with its own images."""

import functools
import math

import pytest
import torch
import trl
from conftest import make_image
from datasets import Dataset
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from jina_vlm.compatibility_jina_vlm import CHECKPOINTING
from miniature import save_miniature
from PIL import Image
from trl.experimental import cpo, gkd, online_dpo, orpo

from jina_vlm_tools.training import JinaVLMCollator
from jina_vlm_tools.training.lora import target_modules


# One tile, two, two images, none: as many images as samples, and not one each
SIZES = {"which?": [(280, 280)], "where?": [(900, 200)], "both?": [(200, 200), (200, 900)], "who?": []}
ANSWERS = {"which?": "a red star", "where?": "left", "both?": "yes", "who?": "a ring"}
OTHERS = {"which?": "no", "where?": "a cross", "both?": "never", "who?": "a green one"}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    return save_miniature(tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="module")
def load(miniature):
    return functools.partial(JinaVLMForConditionalGeneration.from_pretrained, miniature)


@pytest.fixture(scope="module")
def reference(load):
    """The model before it is trained."""
    return load().eval()


def load_processor(miniature, **kwargs):
    processor = JinaVLMProcessor.from_pretrained(miniature, **kwargs)
    processor.image_processor.max_tiles = 2
    return processor


@pytest.fixture(scope="module")
def processor(miniature):
    return load_processor(miniature)


@pytest.fixture(scope="module")
def images() -> dict[str, list[Image.Image]]:
    return {
        question: [
            Image.fromarray(make_image(*size)).rotate(90 * index, expand=True) for index, size in enumerate(sizes)
        ]
        for question, sizes in SIZES.items()
    }


def turns(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def make_rows(images: dict | None = None, **columns: dict[str, str]) -> list[dict]:
    return [
        ({"images": images[question]} if images else {})
        | {"prompt": turns("user", question)}
        | {name: turns("assistant", answers[question]) for name, answers in columns.items()}
        for question in SIZES
    ]


def arguments(config_class, folder, **kwargs):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        CHECKPOINTING: False,
    }
    return config_class(output_dir=str(folder), **settings | kwargs)


def log_probabilities(model, processor, images: list, question: str, answer: str) -> torch.Tensor:
    """Of an answer's tokens and its end, by a pass over this conversation alone."""
    messages = turns("user", question) + turns("assistant", answer)
    inputs = JinaVLMCollator(processor)([{"images": images, "messages": messages}])
    labels = inputs.pop("labels")[0, 1:]
    with torch.no_grad():
        logits = model(**inputs).logits[0, :-1].log_softmax(-1)
    answered = labels != -100
    return logits[answered].gather(1, labels[answered, None])[:, 0]


def sums(model, processor, images: dict | None, answers: dict[str, str]) -> list[float]:
    given = images or dict.fromkeys(SIZES, ())
    return [
        log_probabilities(model, processor, list(given[question]), question, answers[question]).sum().item()
        for question in SIZES
    ]


def train(trainer) -> dict:
    """Train, and give what the first step logged."""
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert trainer.state.global_step == trainer.args.max_steps
    return first


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


lora = pytest.mark.parametrize(
    "is_lora", [pytest.param(False, id="full", marks=pytest.mark.slow), pytest.param(True, id="lora")]
)


def adapters(is_lora: bool) -> dict:
    if not is_lora:
        return {}
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=2, target_modules=target_modules(["connector", "decoder"]))}


# ---------------------------------------------------------------------------------------------------------------------
# Answers that are given
# ---------------------------------------------------------------------------------------------------------------------


@lora
@pytest.mark.parametrize("layout", ["messages", "prompt and completion"])
def test_sft(load, reference, processor, images, tmp_path, layout, is_lora):
    rows, settings = make_rows(images, completion=ANSWERS), {}
    if layout == "messages":
        settings["assistant_only_loss"] = True
        rows = [{"images": row["images"], "messages": row["prompt"] + row["completion"]} for row in rows]
    trainer = trl.SFTTrainer(
        load(),
        arguments(trl.SFTConfig, tmp_path, max_length=None, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        **adapters(is_lora),
    )
    tokens = [
        log_probabilities(reference, processor, images[question], question, ANSWERS[question]) for question in SIZES
    ]
    assert train(trainer)["loss"] == pytest.approx(-torch.cat(tokens).mean().item(), abs=1e-5)


@lora
def test_dpo(load, reference, processor, images, tmp_path, is_lora):
    trainer = trl.DPOTrainer(
        load(),
        args=arguments(trl.DPOConfig, tmp_path, max_length=None, max_steps=2),
        train_dataset=Dataset.from_list(make_rows(images, chosen=ANSWERS, rejected=OTHERS)),
        processing_class=processor,
        **adapters(is_lora),
    )
    logged = train(trainer)
    chosen, rejected = (sums(reference, processor, images, answers) for answers in (ANSWERS, OTHERS))
    assert logged["logps/chosen"] == pytest.approx(mean(chosen), abs=1e-5)
    assert logged["logps/rejected"] == pytest.approx(mean(rejected), abs=1e-5)
    assert logged["loss"] == pytest.approx(0.693147, abs=1e-5)
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["loss"] < logged["loss"]


@lora
def test_kto(load, reference, processor, images, tmp_path, is_lora):
    rows = [row | {"label": index < 2} for index, row in enumerate(make_rows(images, completion=ANSWERS))]
    trainer = trl.KTOTrainer(
        load(),
        args=arguments(trl.KTOConfig, tmp_path, max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        **adapters(is_lora),
    )
    logged = train(trainer)
    expected = sums(reference, processor, images, ANSWERS)
    assert logged["logps/chosen"] == pytest.approx(mean(expected[:2]), abs=1e-5)
    assert logged["logps/rejected"] == pytest.approx(mean(expected[2:]), abs=1e-5)


# TRL's ORPO, CPO and GKD take texts alone, of any model: their processing class is the tokenizer.


def test_orpo(load, reference, processor, tmp_path):
    """It logs means over tokens."""
    trainer = orpo.ORPOTrainer(
        load(),
        args=arguments(orpo.ORPOConfig, tmp_path),
        train_dataset=Dataset.from_list(make_rows(chosen=ANSWERS, rejected=OTHERS)),
        processing_class=processor.tokenizer,
    )
    logged = train(trainer)
    for name, answers in (("chosen", ANSWERS), ("rejected", OTHERS)):
        expected = [log_probabilities(reference, processor, [], question, answers[question]) for question in SIZES]
        assert logged[f"logps/{name}"] == pytest.approx(mean([one.mean().item() for one in expected]), abs=1e-5)


def test_cpo(load, reference, processor, tmp_path):
    trainer = cpo.CPOTrainer(
        load(),
        args=arguments(cpo.CPOConfig, tmp_path),
        train_dataset=Dataset.from_list(make_rows(chosen=ANSWERS, rejected=OTHERS)),
        processing_class=processor.tokenizer,
    )
    logged = train(trainer)
    assert logged["logps/chosen"] == pytest.approx(mean(sums(reference, processor, None, ANSWERS)), abs=1e-5)
    assert logged["logps/rejected"] == pytest.approx(mean(sums(reference, processor, None, OTHERS)), abs=1e-5)


def test_gkd(load, processor, tmp_path):
    """A student that is its teacher has nothing to learn; another one has."""
    losses = []
    for seed in (None, 0):
        student = load()
        if seed is not None:
            torch.manual_seed(seed)
            student.lm_head.weight.data += 0.1 * torch.randn_like(student.lm_head.weight)
        rows = [{"messages": turns("user", question) + turns("assistant", ANSWERS[question])} for question in SIZES]
        trainer = gkd.GKDTrainer(
            student,
            load(),
            args=arguments(gkd.GKDConfig, tmp_path, max_new_tokens=4, lmbda=0.0),
            train_dataset=Dataset.from_list(rows),
            processing_class=processor.tokenizer,
        )
        losses.append(train(trainer)["loss"])
    assert abs(losses[0]) < 1e-5 < 1e-3 < losses[1]


# ---------------------------------------------------------------------------------------------------------------------
# Answers that the model gives itself
# ---------------------------------------------------------------------------------------------------------------------


class Watch:
    """Compares each row of a pass over whole samples with a pass over it alone, with its own question's images."""

    def __init__(self, model, processor, images):
        self.model, self.seen, self.differences, self.is_alone = model, set(), [], False
        self.owned = {}  # by the ids of a prompt: its tiles
        for question in SIZES:
            content = [{"type": "image", "image": image} for image in images[question]]
            chat = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
            inputs = processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            self.owned[tuple(inputs["input_ids"][0].tolist())] = inputs.get(
                "pixel_values", torch.zeros(0, 3, 378, 378)
            )
        model.model.register_forward_hook(self.check, with_kwargs=True)

    def check(self, _, args, kwargs, outputs) -> None:
        given = kwargs.get("pixel_values")
        if self.is_alone or given is None or kwargs.get("tile_positions") is not None:  # the latter in `generate`
            return
        rows = [ids[mask.bool()] for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)]
        prompts = [
            next(prompt for prompt in self.owned if tuple(ids[: len(prompt)].tolist()) == prompt) for ids in rows
        ]
        tiles = [self.owned[prompt] for prompt in prompts]
        if given.ndim == 5:
            assert all(
                torch.equal(row[: len(own)], own) and not row[len(own) :].any()
                for row, own in zip(given, tiles, strict=True)
            )
        else:
            assert torch.equal(given, torch.cat(tiles))
        self.is_alone = True
        for index, (ids, prompt, own) in enumerate(zip(rows, prompts, tiles, strict=True)):
            with torch.no_grad():
                alone = self.model(input_ids=ids[None], **({"pixel_values": own} if len(own) else {})).logits[0]
                found = self.model.lm_head(outputs.last_hidden_state[index][kwargs["attention_mask"][index].bool()])
            answer = ids[len(prompt) :, None]
            of_answer = [each[len(prompt) - 1 : -1].log_softmax(-1).gather(1, answer) for each in (found, alone)]
            self.differences.append((of_answer[0] - of_answer[1]).abs().max().item())
        self.is_alone = False
        self.seen |= {*prompts}


def reward(completions: list, **columns) -> list[float]:
    return [float(len(completion[0]["content"]) % 3) for completion in completions]


WITHOUT_POSITIONS, BY_SAMPLE = {"return_tile_positions": False}, {"tiles_by_sample": True}
GRPO, RLOO = (trl.GRPOTrainer, trl.GRPOConfig), (trl.RLOOTrainer, trl.RLOOConfig)


@pytest.mark.parametrize(
    ("classes", "layout"),
    [
        pytest.param(GRPO, WITHOUT_POSITIONS, id="GRPO"),
        pytest.param(RLOO, WITHOUT_POSITIONS, id="RLOO", marks=pytest.mark.slow),
        pytest.param(GRPO, BY_SAMPLE, id="GRPO by sample", marks=pytest.mark.slow),
        pytest.param(RLOO, BY_SAMPLE, id="RLOO by sample", marks=pytest.mark.slow),
    ],
)
def test_images_stay_with_their_questions(load, miniature, processor, images, tmp_path, classes, layout):
    """Two generations, of two slices and two iterations each, against a reference model; and an evaluation. TRL takes
    rows by sample for rows by image where there are as many images as samples: such rows have one image each here."""
    trainer_class, config_class = classes
    model, rows = load(), make_rows(images)
    if layout == BY_SAMPLE:
        rows = [row | {"images": row["images"][:1] or images["both?"][1:]} for row in rows]
    watch = Watch(model, processor, {row["prompt"][0]["content"]: row["images"] for row in rows})
    trainer = trainer_class(
        model,
        reward,
        arguments(
            config_class,
            tmp_path,
            num_generations=2,
            max_completion_length=4,
            max_steps=5,
            steps_per_generation=2,
            num_iterations=2,
            beta=0.1,
            eval_strategy="steps",
            eval_steps=5,
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=load_processor(miniature, **layout),
    )
    logged = train(trainer)
    assert len(watch.seen) == len(SIZES) and len(watch.differences) >= 20
    assert max(watch.differences) < 1e-5
    assert logged["kl"] == pytest.approx(0, abs=1e-5)
    (evaluated,) = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert math.isfinite(evaluated["eval_loss"])


def test_online_dpo(load, miniature, images, tmp_path):
    """TRL tells by a list of the library's own models whether one sees images, and leaves them out for others. That is
    an error, not an answer to a picture that nobody saw."""
    rows = [{"prompt": row["prompt"], "image": row["images"][0]} for row in make_rows(images) if row["images"]]
    trainer = online_dpo.OnlineDPOTrainer(
        load(),
        reward_funcs=reward,
        args=arguments(online_dpo.OnlineDPOConfig, tmp_path, max_new_tokens=4),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_processor(miniature, return_tile_positions=False),
    )
    with pytest.raises(ValueError, match=r"places for image features, but no images are given\. Pass `pixel_values`"):
        trainer.train()


def test_distillation(load, miniature, processor, images, tmp_path):
    """Of a teacher that the student is, nothing can be learned; of another, something."""
    losses = []
    for noise in (0.0, 0.1):
        model, teacher = load(), load()
        torch.manual_seed(0)
        teacher.lm_head.weight.data += noise * torch.randn_like(teacher.lm_head.weight)
        watch = Watch(model, processor, images)
        trainer = trl.DistillationTrainer(
            model,
            teacher_model=teacher,
            args=arguments(trl.DistillationConfig, tmp_path, max_completion_length=4),
            train_dataset=Dataset.from_list(make_rows(images)),
            processing_class=load_processor(miniature, return_tile_positions=False),
        )
        losses.append(train(trainer)["loss"])
        assert len(watch.seen) == len(SIZES) and max(watch.differences) < 1e-5
    assert abs(losses[0]) < 1e-5 < 1e-3 < losses[1]
