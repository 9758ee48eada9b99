import time

import huggingface_hub
import pytest
from hub_client import STRANGERS, TOKEN, point_to
from hub_server import serve_hub
from huggingface_hub import constants


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    """As on a machine on which nobody has logged in."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))


@pytest.fixture
def hub(monkeypatch, no_token, tmp_path_factory):
    """A Hub that the client in this process talks to, as `me`; waits between its attempts take no time."""
    with serve_hub({TOKEN: "me", STRANGERS: "you"}) as hub:
        point_to(monkeypatch, hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield hub
        huggingface_hub.utils.close_session()
