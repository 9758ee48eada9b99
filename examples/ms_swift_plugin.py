"""jina-vlm in ms-swift 4.6: `swift sft --model checkpoints/tiny --external_plugins examples/ms_swift_plugin.py ...`

ms-swift would write prompts by itself. Here our processor and collator do, so that tokens, tiles and labels are those
of `jina-vlm train`. `MAX_TILES=4 swift ...` sets the most tiles of an image.
"""

from io import BytesIO

import jina_vlm  # noqa: F401  registers the classes, for released weights too
from jina_vlm.image_loading_jina_vlm import open_image
from swift.model import (
    Model,
    ModelGroup,
    ModelLoader,
    ModelMeta,
    MultiModelKeys,
    register_model,
    register_model_arch,
)
from swift.rewards import ORM, orms
from swift.template import Template, TemplateMeta, load_file, register_template
from swift.template.utils import get_token_backed_response_ids
from swift.utils import get_env_args
from transformers import AutoModelForImageTextToText

from jina_vlm_tools.files import TEMPLATE
from jina_vlm_tools.training import JinaVLMCollator


NAME = "jina_vlm"
PLACE = "<image>"  # of an image in a row's text


class JinaVLMLoader(ModelLoader):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.auto_model_cls = AutoModelForImageTextToText

    def get_processor(self, *args, **kwargs):
        processor = super().get_processor(*args, **kwargs)
        # GRPO takes padding out of what was generated. It must keep <|endoftext|>, which ends answers.
        processor.tokenizer.pad_token = "|<EXTRA_TOKENS_0>|"
        if "{% generation" not in str(processor.chat_template).replace("{%-", "{%"):
            processor.chat_template = TEMPLATE.read_text(encoding="utf-8")  # labels are told by its marks
        return processor


class JinaVLMTemplate(Template):
    placeholder_tokens = ["<im_start>", "<im_patch>", "<im_col>", "<im_end>"]  # truncation leaves them

    def init_env_args(self) -> None:
        super().init_env_args()
        if self._loss_scale not in ("default", "last_round") or not self.use_chat_template:
            raise ValueError(
                f"jina-vlm takes --loss_scale default or last_round, and --use_chat_template true; got "
                f"{self._loss_scale} and {self.use_chat_template}."
            )
        self.collator = JinaVLMCollator(self.processor)
        images = self.processor.image_processor
        images.max_tiles = get_env_args("max_tiles", int, images.max_tiles)
        if self.max_pixels is not None:
            images.max_pixels, self.max_pixels = self.max_pixels, None

    def set_mode(self, mode: str) -> None:
        if mode in ("vllm", "sglang", "lmdeploy"):
            raise ValueError(f"jina-vlm generates by transformers here, not by {mode}: --use_vllm false.")
        super().set_mode(mode)

    @staticmethod
    def _load_image(image, load_images: bool):
        """ms-swift finds the file; it is opened as everywhere else: upright, and on white where it is transparent."""
        if isinstance(image, dict):
            image = image.get("bytes") or image["path"]
        file = load_file(image)
        return open_image(file.getvalue()) if isinstance(file, BytesIO) else file

    def _encode(self, inputs) -> dict:
        chat, sampled = self._to_chat(inputs)
        if chat[-1]["role"] == "assistant":
            batch = self.collator([{"messages": chat}])
        else:
            batch = self.processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        encoded = {name: batch[name] for name in ("pixel_values", "tile_positions") if name in batch}
        ids = batch["input_ids"][0].tolist()
        labels = batch["labels"][0].tolist() if "labels" in batch else [-100] * len(ids)
        if self.loss_scale.base_strategy == "last_round" and "labels" in batch:
            start = max(i for i in range(1, len(labels)) if labels[i - 1] == -100 != labels[i])
            labels[:start] = [-100] * start
        encoded["input_ids"] = ids + sampled
        encoded["labels"] = labels + sampled if self.is_training else None
        return encoded

    def _to_chat(self, inputs) -> tuple[list[dict], list[int]]:
        """Messages for our processor; and the tokens of the last answer where a model has just sampled it."""
        if refused := [name for name in ("tools", "videos", "audios", "objects") if getattr(inputs, name)]:
            raise ValueError(f"jina-vlm takes text and images; the row has {', '.join(refused)}.")
        messages = list(inputs.messages)
        if any(message.get(name) is not None for message in messages for name in ("loss", "loss_scale")):
            raise ValueError(
                "jina-vlm learns all answers, or by --loss_scale last_round the last; a message has `loss`."
            )
        sampled = []
        if messages[-1]["role"] == "assistant" and not isinstance(messages[-1]["content"], str):
            sampled = get_token_backed_response_ids(messages.pop()["content"]) or []
        system = self.template_meta.default_system if inputs.system is None else inputs.system
        if system:
            messages.insert(0, {"role": "system", "content": system})
        images = list(inputs.images)
        chat = []
        for message in messages:
            content = []
            for index, text in enumerate(message["content"].split(PLACE, len(images))):
                content += [{"type": "image", "image": images.pop(0)}] if index else []
                content += [{"type": "text", "text": text}] if text else []
            chat.append({"role": message["role"], "content": content})
        return chat, sampled

    def _data_collator_mm_data(self, batch: list[dict]) -> dict:
        tensors = super()._data_collator_mm_data(batch)
        positions = self.concat_tensor(batch, "tile_positions", 0)
        return tensors if positions is None else tensors | {"tile_positions": positions}

    def decode_generate_ids(self, *args, first_token: bool = True, **kwargs) -> str:
        text = super().decode_generate_ids(*args, first_token=first_token, **kwargs)
        return text.strip() if first_token else text  # answers begin with a space


class ExactMatch(ORM):
    """`--reward_funcs exact_match`: 1 for an answer that is the row's `solution`, else 0."""

    def __call__(self, completions: list[str], solution: list[str], **kwargs) -> list[float]:
        return [float(said == right) for said, right in zip(completions, solution, strict=True)]


orms["exact_match"] = ExactMatch

register_model_arch(
    MultiModelKeys(
        NAME,
        language_model=["model.language_model", "lm_head"],
        aligner="model.connector",
        vision_tower="model.vision_model",
    )
)
register_model(
    ModelMeta(
        NAME,
        [ModelGroup([Model(hf_model_id="jinaai/jina-vlm")])],
        JinaVLMLoader,
        template=NAME,
        model_arch=NAME,
        architectures=["JinaVLMForConditionalGeneration"],
        is_multimodal=True,
    )
)
# The words of our chat template, for what ms-swift prints; prompts are made by `JinaVLMTemplate._encode`.
register_template(
    TemplateMeta(
        NAME,
        prefix=["<|endoftext|>"],
        system_prefix=["<|endoftext|> System: {{SYSTEM}} "],
        prompt=[" User: {{QUERY}} Assistant:"],
        chat_sep=[" "],
        template_cls=JinaVLMTemplate,
    )
)
