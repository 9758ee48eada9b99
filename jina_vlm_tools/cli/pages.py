"""What `upload` publishes: a checkpoint, or an adapter for retrieval. Each is assembled, checked and described in its
own way, and sent in the same."""

import argparse
from pathlib import Path

from jina_vlm_tools.extras import needing

from . import options


class CheckpointPage:
    """Of weights in any layout, which bring their code.

    Raises:
        PublishingError: they cannot be published; this is known without loading them.
    """

    default_name = "jina-vlm"
    message = "Upload weights, code and card"
    checking = "Asking it in a fresh process"

    def __init__(self, args: argparse.Namespace):
        from jina_vlm_tools.hub.check import check_shards
        from jina_vlm_tools.hub.origin import find_origin

        self.args, self.source = args, args.weights
        self.origin = find_origin(args.weights, args.license, args.origin)
        check_shards(args.weights)

    def assemble(self, folder: Path) -> None:
        from jina_vlm_tools.hub.assemble import assemble

        self.assembled = assemble(
            self.source, folder, self.args.dtype or "auto", self.args.max_shard_size or options.SHARD_SIZE
        )

    def write_card(self, folder: Path, name: str, results):
        from jina_vlm_tools.hub.card import write_card

        return write_card(folder, name, self.origin, self.assembled.changes, self.assembled.commit, results)

    def list_files(self, folder: Path) -> list[str]:
        from jina_vlm_tools.hub.check import list_bundle

        return list_bundle(folder)

    def check(self, folder: Path) -> dict:
        from jina_vlm_tools.hub.check import ask

        return {"changes": self.assembled.changes, "answer": ask(folder), "origin": self.origin.text}

    def tell(self, report: dict) -> list[str]:
        return [tell_answer(report["answer"])]

    def tell_origin(self) -> str:
        return f"Weights: {self.origin.license}. {self.origin.text}."


class AdapterPage:
    """Of a retrieval folder: adapter and projector, whose base is a page of its own. See [`CheckpointPage`]."""

    default_name = "jina-vlm-retrieval"
    message = "Upload adapter, projector, code and card"
    checking = "Embedding by it in a fresh process"

    def __init__(self, args: argparse.Namespace, is_sent: bool):
        from jina_vlm_tools.hub.origin import find_origin
        from jina_vlm_tools.hub.retrieval import find_files, name_base

        self.args, self.source = args, args.adapter
        base = name_base(self.source, args.base)
        with needing("retrieval", "`jina-vlm upload --adapter`"):
            self.base = find_files(self.source, base, from_hub=is_sent)
        # The base's own card says it, on the Hub or beside its files.
        self.origin = find_origin(base if self.base.commit else str(self.base.place), args.license, base)

    def assemble(self, folder: Path) -> None:
        from jina_vlm_tools.hub.retrieval import assemble

        self.facts = assemble(self.source, folder, self.base)

    def write_card(self, folder: Path, name: str, results):
        from jina_vlm_tools.hub.retrieval_card import write_card

        return write_card(folder, name, self.facts, self.origin, self.base, results)

    def list_files(self, folder: Path) -> list[str]:
        from jina_vlm_tools.hub.retrieval import list_files

        return list_files(folder)

    def check(self, folder: Path) -> dict:
        from jina_vlm_tools.hub.embedding import embed

        return {
            **embed(folder, self.base), "base": self.base.name, "base_files": str(self.base.place),
            "base_commit": self.base.commit,
        }  # fmt: skip

    def tell(self, report: dict) -> list[str]:
        return [*tell_vectors(report), f"With the adapter off it answers as its base: {report['answer']}"]

    def tell_origin(self) -> str:
        where = f"the Hub, commit {self.base.commit}" if self.base.commit else self.base.place
        return f"Base: {self.base.name}, {self.origin.license}; its files are those of {where}."


def tell_answer(answer: str) -> str:
    return f"Asked about a drawing, it begins: {answer}"


def tell_vectors(report: dict) -> list[str]:
    """Of what the fresh process said."""
    lines = []
    for kind, shapes in report["shapes"].items():
        text, image = (" x ".join(map(str, shape)) for shape in shapes)
        cosine = f"cosine {report['agreement'][kind]:.4f} between libraries"
        lines.append(f"It embeds ({kind}): a text as {text}, an image as {image}; {cosine}")
    return lines
