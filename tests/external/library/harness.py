"""What the three families' tests share: they differ in configurations and inputs alone."""

import inspect
import os
import unittest
from pathlib import Path

import jina_vlm
import torch
import transformers
from jina_vlm.conversion_jina_vlm import STRUCTURAL_TOKENS
from tests.test_configuration_common import ConfigTester
from tests.test_image_processing_common import ImageProcessingTestMixin
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin
from tests.test_pipeline_mixin import PipelineTesterMixin
from tests.test_processing_common import ProcessorTesterMixin
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto import modeling_auto, processing_auto

from tests import test_tensor_parallel_mixin


# All models, not only those that the library picks to save time
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


class VLMTester:
    """
    A tiny random model and inputs for it: in each sample one image, then text.

    Families define the methods that raise and the attributes without values. Their configurations agree in the sizes
    that the mixins read here.
    """

    config_class: type[PreTrainedConfig]
    base_model_class: type[PreTrainedModel]
    conditional_generation_class: type[PreTrainedModel]
    image_token: str
    image_tokens: int
    # Above the ids that the mixin for training uses, and below the vocabulary that others shrink to
    special_ids = range(20, 29)
    image_token_id = 20

    batch_size = 3
    is_training = True
    vocab_size = 99
    hidden_size = 32
    intermediate_size = 64
    num_hidden_layers = 2
    num_attention_heads = 4
    num_key_value_heads = 2
    head_dim = 8
    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2
    max_position_embeddings = 256
    vision_config = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    tile_size, patch_size, patches_per_side = 24, 4, 6

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.seq_length = self.image_tokens + 7
        self.causal_lm_class = self.conditional_generation_class

    def get_text_config(self, *names: str) -> dict[str, int]:
        """What every text model is given, and these of the attributes."""
        always = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
        always += " max_position_embeddings pad_token_id bos_token_id eos_token_id"
        return {name: getattr(self, name) for name in [*always.split(), *names]}

    def get_config(self) -> PreTrainedConfig:
        raise NotImplementedError

    def get_image_inputs(self) -> dict[str, torch.Tensor]:
        """The model's inputs for `batch_size` images."""
        raise NotImplementedError

    @classmethod
    def make_processor(cls) -> ProcessorMixin:
        """A processor that fits the model but for its vocabulary: images become tiles of `tile_size` pixels.

        Raises:
            ImportError: a part of it needs what is not installed.
        """
        raise NotImplementedError

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(self.special_ids.stop, self.vocab_size, (self.batch_size, self.seq_length))
        input_ids[:, : self.image_tokens] = self.image_token_id
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        return self.get_config(), inputs | self.get_image_inputs()


class VLMModelTest(
    ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin, PipelineTesterMixin
):
    """All mixins that take a model. A family's test names its `model_tester_class`."""

    model_tester_class: type[VLMTester]
    model_tester = None
    _is_composite = True

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        tester = cls.model_tester_class
        cls.all_model_classes = (tester.base_model_class, tester.conditional_generation_class)
        cls.pipeline_model_mapping = {"image-text-to-text": tester.conditional_generation_class}

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.config_tester = ConfigTester(
            self, config_class=self.model_tester_class.config_class, has_text_modality=False
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_training_overfit(self):
        get_config = self.model_tester.get_config

        def get_config_with_vocabulary() -> PreTrainedConfig:
            config = get_config()
            config.vocab_size = self.model_tester.vocab_size  # looked for where configurations of text models have it
            return config

        self.model_tester.get_config = get_config_with_vocabulary
        super().test_training_overfit()

    def run_task_tests(self, task, dtype="float32"):
        if task in self.pipeline_model_mapping:
            self.save_tiny_model()
        super().run_task_tests(task, dtype)

    def save_tiny_model(self):
        """To where the mixin looks for a model, in the place of the Hub."""
        tester = self.model_tester_class
        try:
            processor = tester.make_processor()
        except ImportError as error:
            self.skipTest(f"No processor: {_first_line(error)}")
        config = self.model_tester.get_config()
        config.text_config.vocab_size = len(processor.tokenizer)
        config.text_config.max_position_embeddings = 2048
        config.image_token_id = processor.tokenizer.convert_tokens_to_ids(tester.image_token)
        if hasattr(config, "structural_token_ids"):
            config.structural_token_ids = processor.tokenizer.convert_tokens_to_ids(list(STRUCTURAL_TOKENS))
        model_class = tester.conditional_generation_class
        folder = Path(os.environ["TRANSFORMERS_TINY_MODEL_PATH"], config.model_type, model_class.__name__)
        model_class(config).save_pretrained(folder)
        processor.save_pretrained(folder)

    def _image_features_prepare_config_and_inputs(self):
        # The library's chooses by what an input's name contains.
        accepted = inspect.signature(self.model_tester.base_model_class.get_image_features).parameters
        inputs = self.model_tester.get_image_inputs()
        return self.model_tester.get_config(), {name: value for name, value in inputs.items() if name in accepted}


class VLMProcessorTest(ProcessorTesterMixin):
    """A family's test names its `model_tester_class`."""

    model_tester_class: type[VLMTester]

    @classmethod
    def setUpClass(cls):
        try:
            super().setUpClass()
        except ImportError as error:
            raise unittest.SkipTest(f"No processor: {_first_line(error)}") from error

    @classmethod
    def _setup_from_components(cls):
        return cls.model_tester_class.make_processor()


class VLMImageProcessorTest(ImageProcessingTestMixin):
    """A family's test names its `image_processor_tester_class`, which must stand in the family's folder."""

    def setUp(self):
        try:
            super().setUp()
            for image_processor_class in self.image_processing_classes.values():
                image_processor_class()
        except ImportError as error:
            self.skipTest(f"No image processor: {_first_line(error)}")


def _first_line(error: ImportError) -> str:
    return str(error).strip().splitlines()[0]


def make_tokenizer(tokens: list[str], **kwargs) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, and of these special tokens."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=tokens, model_input_names=names, **kwargs
    )


def make_template(image_token: str) -> str:
    """A chat template: turns and images as they come."""
    return (
        "{% for message in messages %}{{ ' ' ~ message.role ~ ':' }}{% for part in message.content %}"
        f"{{{{ '{image_token}' if part.type == 'image' else part.text }}}}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %} assistant:{% endif %}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is in the library for its own models, and is put there for ours
# ---------------------------------------------------------------------------------------------------------------------


def register_jina_vlm() -> None:
    """The mixins look classes up by name, in the library's tables."""
    modeling_auto.MODEL_MAPPING_NAMES["jina_vlm"] = "JinaVLMModel"
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["jina_vlm"] = "JinaVLMForConditionalGeneration"
    processing_auto.PROCESSOR_MAPPING_NAMES["jina_vlm"] = "JinaVLMProcessor"
    for name in ("JinaVLMImageProcessor", "JinaVLMProcessor"):
        setattr(transformers, name, getattr(jina_vlm, name))
