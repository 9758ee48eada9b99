"""Training jina-vlm: `python -m jina_vlm_tools train`, and the collator for trainers of one's own."""

from .collator import JinaVLMCollator


__all__ = ["JinaVLMCollator"]
