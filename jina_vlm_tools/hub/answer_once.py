"""Run by `check.py` in a process of its own, which knows nothing of this repository: load a folder, show it a drawn
image, print as JSON what came of it."""

import json
import sys


sys.modules["jina_vlm"] = None  # an import of the package fails: only the folder's own code may be run

import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402


MAX_NEW_TOKENS = 8

folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model, loaded = AutoModelForImageTextToText.from_pretrained(
    folder, trust_remote_code=True, dtype="auto", output_loading_info=True
)

image = Image.new("RGB", (240, 180), "white")
ImageDraw.Draw(image).ellipse((70, 40, 170, 140), fill="red")
chat = [
    {
        "role": "user",
        "content": [{"type": "image", "image": image}, {"type": "text", "text": "Describe the picture."}],
    }
]
inputs = processor.apply_chat_template(
    chat,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    processor_kwargs={"max_tiles": 1},
)
output = model.eval().generate(
    **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
)
new = output.sequences[0, inputs["input_ids"].shape[1] :]
print(
    json.dumps(
        {
            "answer": processor.decode(new, skip_special_tokens=True).strip(),
            "logits_are_finite": all(bool(torch.isfinite(step).all()) for step in output.logits),
            "faults": {name: sorted(map(str, keys)) for name, keys in loaded.items() if keys},
            "code": sorted(
                {
                    type(part).__module__.split(".")[0]
                    for part in (model, model.config, processor, processor.image_processor)
                }
            ),
        }
    )
)
