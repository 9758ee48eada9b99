"""Write the files that are made from others, which `tests/repository/test_repository.py` keeps in step:

python -m scripts.generated_files root      config.json, generation_config.json, processor_config.json at the root
python -m scripts.generated_files bundle    the modules and the chat template, into checkpoints/*
"""

import json
import sys
import tempfile
from pathlib import Path

from jina_vlm_tools.files import ROOT, TEMPLATE, TINY, TINY_RETRIEVAL
from jina_vlm_tools.hub.check import MODULES, bundle_files  # noqa: F401  the names for the tests


ARCHITECTURE = "JinaVLMForConditionalGeneration"


def tiny_files() -> dict[str, bytes]:
    """What checkpoints/tiny has of the root: contents by file name."""
    return {**bundle_files(), TEMPLATE.name: TEMPLATE.read_bytes()}


def copies(folder: Path) -> dict[str, bytes]:
    """What a checkpoint of this repository has of the root; a retrieval folder, its processor alone."""
    files = tiny_files()
    return files if folder == TINY else {name: files[name] for name in files if (folder / name).is_file()}


def root_files() -> dict[str, str]:
    """The settings of the released 2.4B model as the library saves them: texts by file name."""
    from jina_vlm import JinaVLMConfig, JinaVLMImageProcessor, JinaVLMProcessor
    from tokenizers import Tokenizer, models
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    config = JinaVLMConfig(architectures=[ARCHITECTURE])
    text = config.text_config
    generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        suppress_tokens=config.structural_token_ids,
    )
    # A processor cannot be made without a tokenizer. The real one comes with the weights; this one is not kept.
    tokens = ["<|endoftext|>", "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<im_slice>"]
    words = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=tokens[0])
    processor = JinaVLMProcessor(JinaVLMImageProcessor(), tokenizer)

    names = ("config.json", "generation_config.json", "processor_config.json")
    with tempfile.TemporaryDirectory() as folder:
        for part in (config, generation_config, processor):
            part.save_pretrained(folder)
        # The library leaves out the newline at the end of some of them.
        return {name: Path(folder, name).read_text(encoding="utf-8").rstrip() + "\n" for name in names}


def main() -> None:
    match sys.argv[1:]:
        case ["root"]:
            for name, text in root_files().items():
                (ROOT / name).write_text(text, encoding="utf-8", newline="\n")
                print(f"Wrote {name} ({len(json.loads(text))} entries).")
        case ["bundle"]:
            for folder in (TINY, TINY_RETRIEVAL):
                if not folder.is_dir():
                    sys.exit(f"{folder} is not there. Fetch it with the repository.")
                for name, content in copies(folder).items():
                    (folder / name).write_bytes(content)
                    print(f"Wrote {folder.relative_to(ROOT)}/{name}.")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
