"""TRL's GRPO and RLOO as they are installed, with images: every row that the model sees has its own question's image,
and its log-probabilities are those of one forward pass over it alone."""

import pytest
import torch
from answers import prepare
from datasets import Dataset
from jina_vlm import JinaVLMForConditionalGeneration, JinaVLMProcessor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from jina_vlm_tools.files import TINY
from jina_vlm_tools.synthetic.questions import evaluation_sample
from jina_vlm_tools.synthetic.shapes import draw_scene


SIZES = ((280, 280), (520, 300), (300, 700), (280, 280))  # one tile, two, three, one


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Questions whose images have different numbers of tiles, the last of two images."""
    made = []
    for seed, size in enumerate(SIZES):
        sample = evaluation_sample(seed, "count", "en")
        image = draw_scene(sample.scene).resize(size)
        images = [image, image.rotate(90)] if seed == 3 else [image]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": f"{seed}: {sample.turn.question}"}]
        made.append({"images": images, "prompt": [{"role": "user", "content": content}], "answer": sample.turn.answer})
    return made


@pytest.fixture
def processor():
    return JinaVLMProcessor.from_pretrained(TINY, tiles_by_sample=True)


def own_images(rows: list[dict], processor) -> dict[tuple[int, ...], torch.Tensor]:
    """By the ids of a prompt: its tiles."""
    owned = {}
    for row in rows:
        inputs = prepare(processor, [*row["images"], row["prompt"][0]["content"][-1]["text"]])
        owned[tuple(inputs["input_ids"][0].tolist())] = inputs["pixel_values"][0]
    return owned


def reward(completions: list, answer: list[str], **kwargs) -> list[float]:
    return [float(len(completion[0]["content"]) % 3) for completion in completions]


@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [(GRPOTrainer, GRPOConfig), pytest.param(RLOOTrainer, RLOOConfig, marks=pytest.mark.slow)],
)
def test_images_stay_with_their_questions(rows, processor, tmp_path, trainer_class, config_class):
    """Two generations of two slices and two iterations each, against a reference model."""
    model = JinaVLMForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    owned, seen, differences = own_images(rows, processor), set(), []

    def check(_, args, kwargs, outputs) -> None:
        """Of a pass over whole samples, which steps of `generate` are not."""
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None or pixel_values.ndim != 5:
            return
        for index, (ids, mask) in enumerate(zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)):
            real = ids[mask.bool()]
            (prompt,) = [prompt for prompt in owned if tuple(real[: len(prompt)].tolist()) == prompt]
            tiles = owned[prompt]
            assert torch.equal(pixel_values[index][: len(tiles)], tiles)
            assert not pixel_values[index][len(tiles) :].any()
            with torch.no_grad():
                alone = model(input_ids=real[None], pixel_values=tiles).logits[0]
                found = model.lm_head(outputs.last_hidden_state[index][mask.bool()])
            answer = real[len(prompt) :, None]
            of_answer = [each[len(prompt) - 1 : -1].log_softmax(-1).gather(1, answer) for each in (found, alone)]
            differences.append((of_answer[0] - of_answer[1]).abs().max().item())
            seen.add(prompt)

    model.model.register_forward_hook(check, with_kwargs=True)
    arguments = config_class(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        max_steps=6,
        steps_per_generation=2,
        num_iterations=2,
        beta=0.1,
        learning_rate=1e-6,
        bf16=False,
        report_to=[],
        save_strategy="no",
    )
    dataset = Dataset.from_list(rows)
    trainer = trainer_class(model, reward, arguments, train_dataset=dataset, processing_class=processor)
    trainer.train()
    assert len(seen) == len(rows) and len(differences) >= 24
    assert max(differences) < 1e-5
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry)
