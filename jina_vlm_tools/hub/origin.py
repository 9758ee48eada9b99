"""Where weights come from, what one may do with them, and which languages they know."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from jina_vlm_tools.files import TINY
from jina_vlm_tools.sources import RELEASED

from . import PublishingError


# The metadata of the release's own card that hold for its weights wherever they are published.
RELEASED_CARD = ModelCardData(
    license="cc-by-nc-4.0",
    base_model=RELEASED,
    language=(
        "en zh ar pt ru tr de es fr it ja ko vi th id hi bn nl pl sv fi da no cs el he uk ro hu multilingual".split()
    ),
    tags=["multimodal", "multilingual", "vlm", "vision-language", "qwen3", "siglip2"],
)
TINY_CARD = ModelCardData(license="apache-2.0", language=["en", "de", "es", "fr"])


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    `text` says it in a sentence; `base_model` is the same as an id of the Hub, where it is one. `is_tiny` marks this
    repository's small checkpoint, of which the page says more. `license_name` and `license_link` go with the license
    `other`.
    """

    license: str
    text: str
    base_model: str | None = None
    languages: list[str] | None = None
    tags: list[str] | None = None
    is_tiny: bool = False
    license_name: str | None = None
    license_link: str | None = None


def is_repo_id(name: str) -> bool:
    """Whether this is owner/name, rather than a folder or a sentence."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def find_origin(weights: str, license: str | None = None, origin: str | None = None) -> Origin:
    """
    Origin and license of `weights`, a folder or an id of the Hub: as given, as this repository knows them, or from the
    checkpoint's own model card.

    Raises:
        PublishingError: one of the two is known from nowhere, or what is given contradicts what is known.
    """
    is_folder = Path(weights).is_dir()
    if not is_folder and not is_repo_id(weights):
        raise PublishingError(
            f"--weights {weights}: neither a folder nor the name of a repository on the Hub (owner/name)."
        )
    is_tiny = Path(weights).resolve() == TINY.resolve()
    if is_tiny:
        known = TINY_CARD
        origin = origin or "The weights were trained from nothing by the repository that this code comes from."
    else:
        known = RELEASED_CARD if weights == RELEASED else _own_card(weights)

    if license and known.license and license != known.license:
        raise PublishingError(
            f"--license is {license}, but the model card of {weights} says {known.license}. "
            "Publishing does not change a license: leave --license out, or correct the card."
        )
    if not (license := license or known.license):
        raise PublishingError(
            f"The license of {weights} is not known: no model card beside it names one. "
            "Say which with --license, by the Hub's identifier (such as apache-2.0 or cc-by-nc-4.0)."
        )
    if license == "other" and not (known.license_name and known.license_link):
        raise PublishingError(
            f"The license of {weights} is `other`. "
            "Name it by license_name and license_link in the front matter of its README.md."
        )

    if not origin and not is_folder:
        origin = weights
    said_by_card = not origin
    base_model = origin if origin and is_repo_id(origin) else known.base_model
    if not (origin := origin or (base_model if isinstance(base_model, str) else None)):
        raise PublishingError(
            f"Where the weights in {weights} come from is not known: no model card beside them names a base_model. "
            "Say it with --origin: the id of a model on the Hub, or a sentence "
            '("The weights were trained from nothing on ...").'
        )
    # A card's base_model may be the same weights in another layout, or what they were trained from.
    verb = "derive" if said_by_card else "come"
    link = f"The weights {verb} from [{origin}](https://huggingface.co/{origin})"
    return Origin(
        license=license,
        text=link if is_repo_id(origin) else origin.rstrip("."),
        base_model=base_model,
        languages=[known.language] if isinstance(known.language, str) else known.language,
        tags=RELEASED_CARD.tags if known is RELEASED_CARD else None,
        is_tiny=is_tiny,
        license_name=known.license_name,
        license_link=known.license_link,
    )


def _own_card(weights: str) -> ModelCardData:
    if Path(weights).is_dir():
        card = Path(weights, "README.md")
        return ModelCard.load(card, ignore_metadata_errors=True).data if card.is_file() else ModelCardData()
    try:
        return ModelCard.load(weights, ignore_metadata_errors=True).data
    except RemoteEntryNotFoundError:
        return ModelCardData()
