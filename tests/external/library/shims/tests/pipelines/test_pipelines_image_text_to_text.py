"""Lost: the library's checks on what a pipeline with this model answers. These ask for less: an answer to each input,
with an image given by itself and within a chat."""

from PIL import Image
from transformers.pipelines import ImageTextToTextPipeline


class ImageTextToTextPipelineTests:
    def get_test_pipeline(self, model, tokenizer, processor=None, image_processor=None, dtype="float32", **kwargs):
        pipe = ImageTextToTextPipeline(model=model, processor=processor, dtype=dtype, max_new_tokens=4)
        token = getattr(processor, "image_token", "") or ""
        images = [Image.new("RGB", size, "teal") for size in ((40, 30), (20, 60))]
        return pipe, [{"images": image, "text": f"{token} What is this?"} for image in images]

    def run_pipeline_test(self, pipe, examples):
        one = examples[0]
        assert isinstance(pipe(one["images"], text=one["text"])[0]["generated_text"], str)
        parts = [{"type": "image", "image": one["images"]}, {"type": "text", "text": "What is this?"}]
        answer = pipe(text=[{"role": "user", "content": parts}], return_full_text=False)[0]
        assert isinstance(answer["generated_text"], str)
