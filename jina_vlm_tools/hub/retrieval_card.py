"""The page of a retrieval folder: `retrieval_card.md.jinja`, filled with what the folder and its base say."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .card import Results, check_card, license_url, read_dependencies, shared_data
from .embedding import Base
from .origin import Origin
from .retrieval import PARTS, Facts


TEMPLATE = Path(__file__).with_name("retrieval_card.md.jinja")
TAGS = [
    "sentence-transformers", "peft", "lora", "transformers", "jina-vlm", "multi-vector", "late-interaction",
    "feature-extraction", "multimodal-embedding", "custom_code",
]  # fmt: skip
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes for `--max-lora-rank`


def write_card(
    folder: Path, name: str, facts: Facts, origin: Origin, base: Base, results: Results | None = None
) -> ModelCard:
    """
    Write the folder's README.md.

    Args:
        name: The id that the page's code loads, owner/name on the Hub.
        origin: Of the base.
        results: Of [`card.read_results`].

    Raises:
        PublishingError: the metadata would not be valid.
    """
    measured, evaluations = results or ("", [])
    is_for_decoder = facts.parts == (PARTS["language_model"],)
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="visual-document-retrieval",
        base_model=base.name,
        base_model_relation="adapter",
        tags=TAGS,
        **shared_data(name, origin, evaluations),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        facts=facts,
        origin=origin,
        base=base.name,
        commit=base.commit,
        is_for_decoder=is_for_decoder,
        max_lora_rank=next((rank for rank in LORA_RANKS if is_for_decoder and rank >= facts.rank), None),
        dependencies=read_dependencies(),
        license_url=license_url(origin),
        measured=measured,
    )
    card.save(folder / "README.md")
    check_card(folder / "README.md")
    return card
