"""Lost: nearly all tests of `generate` (assisted decoding, static caches, compilation, scores, stopping, and more).
The three here take their place."""

import torch
from transformers import set_seed


class GenerationTesterMixin:
    def _models_and_inputs(self):
        for model_class in self.all_generative_model_classes:
            set_seed(0)
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            yield model_class(config).eval(), inputs

    def _first_sample(self, inputs: dict) -> dict:
        # Images may have several rows.
        return {name: value[: len(value) // self.model_tester.batch_size] for name, value in inputs.items()}

    def test_generate_is_the_same_without_a_cache(self):
        for model, inputs in self._models_and_inputs():
            settings = {"min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
            with_cache = model.generate(**inputs, **settings, use_cache=True)
            assert torch.equal(model.generate(**inputs, **settings, use_cache=False), with_cache)

    def test_generate_with_beams_keeps_images_with_their_texts(self):
        for model, inputs in self._models_and_inputs():
            settings = {
                "min_new_tokens": 5,
                "max_new_tokens": 5,
                "do_sample": False,
                "num_beams": 3,
                "num_return_sequences": 2,
            }
            sequences = model.generate(**inputs, **settings)
            assert len(sequences) == 2 * self.model_tester.batch_size
            assert torch.equal(model.generate(**self._first_sample(inputs), **settings), sequences[:2])

    def test_generate_samples_several_answers(self):
        for model, inputs in self._models_and_inputs():
            sequences = model.generate(
                **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=True, num_return_sequences=2
            )
            assert sequences.shape == (2 * self.model_tester.batch_size, inputs["input_ids"].shape[1] + 3)
