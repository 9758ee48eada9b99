"""What tests publish as, and where the Hub's client in this process goes."""

from huggingface_hub import constants


TOKEN, STRANGERS = "hf_SecretOfMine0123456789", "hf_SecretOfYours0123456789"


def point_to(monkeypatch, endpoint: str) -> None:
    """As HF_ENDPOINT does, which the client reads once."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
