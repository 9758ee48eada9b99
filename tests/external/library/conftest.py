"""Puts the library's test mixins onto the path before the tests that use them are collected."""

import os
import sys

from sdist import library_checkout


checkout = library_checkout()
sys.path[:0] = [str(checkout)]
# Where the pipeline tests look for small models, in the place of the Hub: `harness.save_tiny_model` puts them there.
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(checkout / "tiny_models")
os.environ["HF_HUB_OFFLINE"] = "1"

import harness  # noqa: E402


harness.register_jina_vlm()
