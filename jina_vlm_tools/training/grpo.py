"""Reinforcement learning on answers that can be checked: TRL's GRPO, on questions of a mixture."""

import copy
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from jina_vlm import JinaVLMProcessor
from trl import GRPOTrainer

from .answers import ask_all
from .collator import JinaVLMCollator
from .layouts import BadSample
from .mixture import Plan
from .rewards import REWARDS, Pattern
from .stages import EvaluationSettings, GrpoSettings
from .trainer import ByParts


class QuestionCollator(JinaVLMCollator):
    """Asks of samples to end in a question and an answer that rewards can compare with.

    Args:
        processor, max_length: As of [`JinaVLMCollator`].
        grpo (`GrpoSettings`): The rewards.
    """

    def __init__(self, processor, max_length: int | None, grpo: GrpoSettings):
        super().__init__(processor, max_length)
        self.rewards = rewards_of(grpo)
        self.checks = [reward.__name__ for reward in self.rewards]

    def check(self, conversation: list[dict]) -> None:
        if [message["role"] for message in conversation[-2:]] != ["user", "assistant"]:
            raise BadSample("It does not end in a question and its answer, which rewards are given for.")
        if any(part["type"] != "text" for part in conversation[-1]["content"]):
            raise BadSample("Its answer has an image, which no reward compares with.")
        answer = to_question(conversation)["answer"]
        try:
            for reward in self.rewards:
                reward([answer], answer=[answer.strip()])
        except ValueError as error:
            raise BadSample(str(error)) from error


def rewards_of(grpo: GrpoSettings) -> list[Callable]:
    return [REWARDS.get(one.name) or Pattern(one.pattern) for one in grpo.rewards]


def to_question(conversation: list[dict]) -> dict[str, Any]:
    """A chat to what TRL takes: the `prompt`, with its images inside, and the right `answer`."""
    *prompt, last = conversation
    return {"prompt": prompt, "answer": "".join(part["text"] for part in last["content"])}


def questions(plan: Plan) -> Dataset:
    """The questions of a plan in their order, opened when they are asked for."""
    places = [place for batch in plan for place in batch]

    def open_questions(rows: dict[str, list]) -> dict[str, list]:
        chosen = [places[index] for index in rows["index"]]
        opened = [to_question(plan.sources[place.source].sample(place)["messages"]) for place in chosen]
        return {name: [question[name] for question in opened] for name in ("prompt", "answer")}

    return Dataset.from_dict({"index": range(len(places))}).with_transform(open_questions)


def grpo_arguments(grpo: GrpoSettings) -> dict[str, Any]:
    """Of a `GRPOConfig`, what a stage says, beside what all trainers have."""
    return {
        "num_generations": grpo.answers,
        "num_generations_eval": 1,
        "max_completion_length": grpo.max_new_tokens,
        "temperature": grpo.temperature,
        "beta": grpo.kl,
        "reward_weights": [reward.weight for reward in grpo.rewards],
        "shuffle_dataset": False,  # the plan has
    }


class JinaVLMGRPOTrainer(ByParts, GRPOTrainer):
    """
    Args:
        plan (`Plan`): The questions: each of its batches is those of one step.
        grpo (`GrpoSettings`): Their rewards.
        eval_dataset (`list[dict]`, *optional*): Samples as chats.
        evaluation (`EvaluationSettings`, *optional*): How they are asked.
        kwargs: Of [`ByParts`] and `GRPOTrainer`.
    """

    def __init__(
        self,
        *args,
        plan: Plan,
        grpo: GrpoSettings,
        processing_class: JinaVLMProcessor,
        eval_dataset: list[dict] | None = None,
        evaluation: EvaluationSettings | None = None,
        **kwargs,
    ):
        self.plan, self.evaluation, self.asked = plan, evaluation, eval_dataset
        without_positions = copy.copy(processing_class)
        without_positions.return_tile_positions = False  # TRL hands on `pixel_values` alone
        super().__init__(
            *args,
            reward_funcs=rewards_of(grpo),
            train_dataset=questions(plan),
            eval_dataset=Dataset.from_dict({"prompt": []}) if evaluation else None,
            processing_class=without_positions,
            **kwargs,
        )

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        """Ask, in the place of sampling answers for rewards."""
        right = ask_all(self.model, self.processing_class, self.asked, self.evaluation, self.accelerator)
        metrics = {f"{metric_key_prefix}_accuracy": right}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
