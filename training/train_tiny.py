"""Train the small checkpoint from scratch on pictures of coloured shapes: `python -m training.train_tiny`.

1. Seeing (`seeing`): the tower and the connector learn what is where, token by token.
2. Talking: the text model learns to answer. Each sample is one picture and many questions about it, since most of the time
   goes into the picture and more questions cost little; mostly each question sees the picture alone, so that no answer
   can be copied from an earlier one. First come boards full of shapes and lists of what they hold, then pictures of up to
   five shapes. The tower stays as it is.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.trainer_utils import get_last_checkpoint

from .muon import Muon, parameter_groups
from .questions import EVALUATION_SEEDS, Sample, training_sample
from .seeing import SceneCollator, ScenesDataset, TokenReader
from .tokenizer import ADDITIONAL_ROWS, BASE_SIZE, STRUCTURAL_TOKENS, train_tokenizer


ROOT = Path(__file__).parent.parent
EMBEDDING_SIZE = 0.5  # root mean square


def bundle_class(name: str):
    """A class of the bundle at the repository's root, such as "modeling_jina_vlm.JinaVLMModel"."""
    return get_class_from_dynamic_module(name, str(ROOT))


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


class ShapesDataset(Dataset):
    """Sample i is drawn from seed `first_seed` + i. The first `boards` samples are boards."""

    def __init__(self, length: int, boards: int, first_seed: int = 0):
        self.length, self.boards, self.first_seed = length, boards, first_seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return training_sample(self.first_seed + index, board=index < self.boards)


class ConversationCollator:
    """Samples to a batch. A sample becomes one row: the picture, and after it the rest of each of its conversations, which
    sees the picture and itself alone, at the positions that it has when it stands alone. So the picture, most of the tokens,
    is computed once for many questions. Labels are the assistants' tokens."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        conversations = [sample.conversations() for sample in samples]
        batch = self.processor.apply_chat_template(
            [[{"role": "user", "content": first[0]["content"][:1]}] for first, *_ in conversations],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        pictures = batch.pop("input_ids")  # as long as each other: one tile and one thumbnail
        batch.pop("attention_mask")
        after, labels, owners = zip(*(self.after_picture(some) for some in conversations), strict=True)
        end = self.processor.tokenizer.eos_token_id
        after = pad_sequence(after, batch_first=True, padding_value=end)
        owners = pad_sequence(owners, batch_first=True, padding_value=-1)  # the number of the conversation; 0: the picture
        owners = torch.cat([torch.zeros_like(pictures), owners], dim=1)
        same = (owners[:, :, None] == owners[:, None, :]) | (owners[:, None, :] == 0)
        allowed = same.tril()
        return {
            **batch,
            "input_ids": torch.cat([pictures, after], dim=1),
            "attention_mask": allowed[:, None],
            "position_ids": allowed.sum(dim=-1) - 1,  # how many tokens it sees before itself
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            # Nothing is to be predicted within the picture: it needs no logits.
            "logits_to_keep": after.shape[1],
        }

    def after_picture(self, conversations: list[list[dict]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, labels and numbers from 1 of the conversations' tokens after the picture, each [length]."""
        encoded = self.processor.tokenizer.apply_chat_template(
            conversations,
            chat_template=self.processor.chat_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, labels, owners = [], [], []
        for number, (tokens, answered) in enumerate(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True), start=1):
            start = tokens.index(self.processor.image_token_id) + 1
            ids += tokens[start:]
            labels += [token if is_answer else -100 for token, is_answer in zip(tokens, answered, strict=True)][start:]
            owners += [number] * (len(tokens) - start)
        return torch.tensor(ids), torch.tensor(labels), torch.tensor(owners)


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


def make_processor():
    image_processor = bundle_class("image_processing_jina_vlm.JinaVLMImageProcessor")()
    template = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
    return bundle_class("processing_jina_vlm.JinaVLMProcessor")(image_processor, train_tokenizer(), chat_template=template)


def make_model(tokenizer):
    """A new model of the real geometry and small widths, which are multiples of 64."""
    structural = tokenizer.convert_tokens_to_ids(list(STRUCTURAL_TOKENS))
    end_of_text = tokenizer.eos_token_id
    config = bundle_class("configuration_jina_vlm.JinaVLMConfig")(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 378,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "vocab_size": BASE_SIZE + ADDITIONAL_ROWS,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": tokenizer.model_max_length,
            "initializer_range": 0.05,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
            "pad_token_id": end_of_text,
        },
        vision_feature_layers=[3, 1],
        connector_num_attention_heads=2,
        connector_head_dim=64,
        connector_intermediate_size=256,
        image_token_id=structural[STRUCTURAL_TOKENS.index("<im_patch>")],
        structural_token_ids=structural,
    )
    model = bundle_class("modeling_jina_vlm.JinaVLMForConditionalGeneration")(config)
    with torch.no_grad():
        positions = model.model.vision_model.tower.embeddings.position_embedding.weight
        positions.copy_(sine_cosine_positions(27, config.vision_config.hidden_size))
        # Words as large as what layers add to them: smaller ones would drown in it.
        model.get_input_embeddings().weight.normal_(std=EMBEDDING_SIZE)
    return model


def sine_cosine_positions(side: int, width: int) -> torch.Tensor:
    """[side * side, width]: a quarter of the width each for sine and cosine of the row, and of the column, at wavelengths
    from 2 pi to 2 pi * 100 patches. With these as initial values places can be read off by a linear layer from the start."""
    frequencies = 100 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


@torch.no_grad()
def match_sizes(model, pixel_values: torch.Tensor) -> None:
    """Scale the connector's last layer so that image tokens are as large as words, and start with no `<im_patch>` to add."""
    tokens = model.model.connector(
        model.model.vision_model(pixel_values).last_hidden_state, torch.ones(len(pixel_values), dtype=torch.bool)
    )
    model.model.connector.down_proj.weight.mul_(EMBEDDING_SIZE / tokens.pow(2).mean().sqrt())
    model.get_input_embeddings().weight[model.config.image_token_id] = 0


def encode_pictures_once(vision_model) -> None:
    """A picture of one tile is its own thumbnail: the tower need see only one of the two. Halves its time on such pictures,
    and changes nothing else."""
    forward = vision_model.forward

    def forward_once(pixel_values: torch.Tensor, **kwargs):
        outputs = forward(pixel_values[::2], **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state.repeat_interleave(2, dim=0)
        return outputs

    vision_model.forward = forward_once


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenes", type=int, default=6_000, help="pictures to learn to see from (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=20_000, help="pictures to talk about (default: %(default)s)")
    parser.add_argument("--boards", type=float, default=0.2, help="share of these that are boards, at the start")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "checkpoints" / "tiny")
    parser.add_argument("--run", type=Path, default=ROOT / "training" / "runs" / "tiny", help="folder of the Trainer's checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last of them")
    return parser.parse_args()


def train(args: argparse.Namespace, stage: str, model, dataset: Dataset, collator, matrix_lr: float, other_lr: float):
    """One stage, with the library's Trainer: every sample once, in order."""
    folder = args.run / stage
    training_args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=1,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        max_grad_norm=1.0,
        logging_steps=25,
        save_steps=250,
        save_total_limit=2,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        report_to="none",
        seed=args.seed,
    )
    optimizer = Muon(parameter_groups(model, matrix_lr, other_lr, weight_decay=0.02))
    trainer = Trainer(model, training_args, collator, dataset, optimizers=(optimizer, None))
    last = get_last_checkpoint(str(folder)) if args.resume and folder.is_dir() else None
    print(f"{stage}: {len(dataset):,} pictures", flush=True)
    trainer.train(resume_from_checkpoint=last)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    processor = make_processor()
    model = make_model(processor.tokenizer)
    print(f"{model.num_parameters():,} parameters")

    scenes = ScenesDataset(args.scenes, first_seed=EVALUATION_SEEDS // 2)
    collator = SceneCollator(processor.image_processor)
    train(args, "seeing", TokenReader(model), scenes, collator, matrix_lr=4e-3, other_lr=1e-3)

    match_sizes(model, collator([scenes[i] for i in range(16)])["pixel_values"])
    model.model.vision_model.requires_grad_(False)
    encode_pictures_once(model.model.vision_model)
    samples = ShapesDataset(args.samples, boards=int(args.boards * args.samples))
    train(args, "talking", model, samples, ConversationCollator(processor), matrix_lr=4e-3, other_lr=2e-3)

    model.to(torch.bfloat16).save_pretrained(args.output)
    processor.save_pretrained(args.output)
    print(f"Saved to {args.output}. `make bundle` puts the modules beside it.")


if __name__ == "__main__":
    main()
