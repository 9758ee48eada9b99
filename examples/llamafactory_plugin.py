"""jina-vlm in LLaMA-Factory 0.9.5: `DISABLE_VERSION_CHECK=1 python examples/llamafactory_plugin.py train mine.yaml`

That is `llamafactory-cli` with a template, `jina_vlm`, by which our processor and collator make tokens, tiles and
labels. Its own settings of images (`image_max_pixels`, ...) do not count; the checkpoint's do.
"""

from dataclasses import dataclass

import jina_vlm  # noqa: F401  registers the classes, for released weights too
from llamafactory.cli import main
from llamafactory.data.mm_plugin import BasePlugin, get_mm_plugin, register_mm_plugin
from llamafactory.data.template import Template, register_template
from llamafactory.model.model_utils import visual

from jina_vlm_tools.training import JinaVLMCollator
from jina_vlm_tools.training.layouts import load_image


NAME = "jina_vlm"
PLACE = "<image>"  # of an image in a row's text


@dataclass
class JinaVLMPlugin(BasePlugin):
    def process_messages(self, messages, images, videos, audios, processor) -> list[dict]:
        """The messages with their images, and the processor, for `JinaVLMTemplate`."""
        if videos or audios:
            raise ValueError("jina-vlm takes text and images; a row has videos or audio.")
        left = [load_image(image) for image in images]
        chat = []
        for message in messages:
            content = []
            for index, text in enumerate(message["content"].split(PLACE, len(left))):
                content += [{"type": "image", "image": left.pop(0)}] if index else []
                content += [{"type": "text", "text": text}] if text else []
            chat.append({"role": message["role"], "content": content, "processor": processor})
        if left:
            raise ValueError(f"A row has {len(images)} images, but {len(left)} fewer {PLACE} in its messages.")
        return chat

    def process_token_ids(self, input_ids, labels, *others):
        return input_ids, labels

    def get_mm_inputs(self, images, videos, audios, imglens, vidlens, audlens, batch_ids, processor) -> dict:
        if not images:
            return {}
        return dict(processor.image_processor([load_image(image) for image in images], return_tensors="pt"))


class JinaVLMTemplate(Template):
    def _encode(self, tokenizer, messages, system, tools) -> list[list[int]]:
        """Tokens of what is given and of what is learned, in turn."""
        if tools:
            raise ValueError("jina-vlm takes text and images; a row has tools.")
        chat = [{"role": message["role"], "content": message["content"]} for message in messages]
        if system := system or self.default_system:
            chat.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        batch = JinaVLMCollator(messages[0]["processor"])([{"messages": chat}])
        parts = [[]]
        for token, label in zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True):
            # Labels are tokens here: that an answer ends is learned of the last one only, which has it in its text.
            if (token == label) == (len(parts) % 2):
                parts.append([])
            parts[-1].append(token)
        return parts


register_mm_plugin(NAME, JinaVLMPlugin)
register_template(NAME, mm_plugin=get_mm_plugin(NAME), template_class=JinaVLMTemplate)
# For `freeze_vision_tower` and the like, and for `lora_target: all`
visual._register_composite_model(NAME, projector_keys=["connector"], vision_model_keys=["vision_model"])

if __name__ == "__main__":
    main()
