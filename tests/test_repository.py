"""The repository itself: files that are made from others are in step, the guide is right, the bundle needs little."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jina_vlm
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from jina_vlm import compatibility_jina_vlm


ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ALLOWED_IMPORTS = {"torch", "numpy", "PIL", "transformers", "huggingface_hub", "safetensors"}  # transformers brings the last two


def load_script(path: str):
    """A script of the repository as a module, wherever pytest was started."""
    spec = importlib.util.spec_from_file_location(f"_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generated = load_script("tools/generated_files.py")


# ----------------------------------------------------------------------------------------------------------------------
# Files made from others
# ----------------------------------------------------------------------------------------------------------------------


def test_root_config_is_the_released_model():
    config = jina_vlm.JinaVLMConfig.from_pretrained(ROOT)
    expected = jina_vlm.JinaVLMConfig(architectures=["JinaVLMForConditionalGeneration"])
    differs = {"transformers_version", "auto_map", "_name_or_path"}
    as_dict = [{k: v for k, v in c.to_dict().items() if k not in differs} for c in (config, expected)]
    assert as_dict[0] == as_dict[1]
    auto_map = json.loads((ROOT / "config.json").read_text())["auto_map"]
    generating = {"AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"}
    assert set(auto_map) == {"AutoConfig", "AutoModel", *generating}
    for target in auto_map.values():
        module, name = target.split(".")
        assert module + ".py" in generated.MODULES and hasattr(jina_vlm, name)


def test_root_files_are_in_step_with_the_classes():
    for name, text in generated.root_files().items():
        made, stored = json.loads(text), json.loads((ROOT / name).read_text(encoding="utf-8"))
        if transformers.__version__ == stored.get("transformers_version", transformers.__version__):
            assert made == stored, f"{name}: run `make root-files`"
        else:  # other versions write other defaults into the parts
            parts = {"text_config", "vision_config", "transformers_version"}
            assert {k: v for k, v in made.items() if k not in parts} == {k: v for k, v in stored.items() if k not in parts}


def test_root_generation_config_suppresses_structural_tokens():
    config = jina_vlm.JinaVLMConfig()
    generation_config = transformers.GenerationConfig.from_pretrained(ROOT)
    assert generation_config.suppress_tokens == config.structural_token_ids
    assert generation_config.eos_token_id == generation_config.bos_token_id == generation_config.pad_token_id == 151643


def test_bundle_holds_the_roots_modules():
    if not generated.TINY.is_dir():
        pytest.skip("checkpoints/tiny has not been trained yet")
    for name, content in generated.bundle_files().items():
        path = generated.TINY / name
        assert path.is_file() and not path.is_symlink(), f"{name}: run `make bundle`"
        assert path.read_bytes() == content, f"{name} differs from the root's: run `make bundle`"


# ----------------------------------------------------------------------------------------------------------------------
# The guide
# ----------------------------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_guide():
    parameters = load_script("benchmarks/parameters.py")
    parts = parameters.count(jina_vlm.JinaVLMConfig.from_pretrained(ROOT))
    assert parts["Total"] == sum(number for part, number in parts.items() if part != "Total")
    assert parts["Total"] == 2_450_807_760
    assert parameters.table(parts) in README.read_text(encoding="utf-8"), "run `make parameters`"
    with torch.device("meta"):
        model = jina_vlm.JinaVLMForConditionalGeneration(jina_vlm.JinaVLMConfig())
    assert model.num_parameters() == parts["Total"]


def test_token_counts_of_the_guide(processor):
    rows = re.findall(r"^\| (\d+) x (\d+) \| (.*) \|$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) >= 5
    for width, height, cells in rows:
        size = (int(height), int(width))
        for max_tiles, cell in zip((1, 4, 12), cells.split(" | "), strict=True):
            grid = processor.image_processor.get_tiling(*size, max_tiles=max_tiles)[1]
            counted = processor._get_num_multimodal_tokens([size], max_tiles=max_tiles)["num_image_tokens"][0]
            assert cell == f"{grid[0]} x {grid[1]}: {counted:,}"


def test_front_matter_is_what_the_hub_reads():
    card = ModelCard.load(README)
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["license"] == "cc-by-nc-4.0"
    assert data["base_model"] == "jinaai/jina-vlm"
    assert all(isinstance(entry, str) for key in ("tags", "language") for entry in data[key])


def python_snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_snippets_of_the_guide_are_python():
    snippets = python_snippets()
    assert len(snippets) >= 5
    for snippet in snippets:
        ast.parse(snippet)


def test_links_of_the_guide_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)\)", text):
        if not target.startswith("checkpoints/") or generated.TINY.is_dir():
            assert (ROOT / target).exists(), target


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_its_targets():
    listed = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "test-slow", "test-newest", "test-matrix", "train-tiny", "eval-tiny", "bundle", "root-files", "clean"):
        assert re.search(rf"^\s+make {target}\s+\S", listed, flags=re.MULTILINE), target
    named = re.findall(r"`make ([a-z-]+)", README.read_text(encoding="utf-8"))
    assert named and all(f"make {target} " in listed for target in named)


def test_versions_named_are_those_of_the_matrix():
    command = [sys.executable, "-m", "tools.test_matrix", "--list"]
    cells = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    versions = {version for cell in cells for version in re.fullmatch(r"python(.+)-transformers(.+)-torch(.+)", cell).groups()}
    assert {"3.11", "3.12", "3.13", "5.19.0", "5.22.2", "5.23.0", "5.24.0", "2.13.0", "2.15.0"} <= versions
    told = "".join(path.read_text(encoding="utf-8") for path in (README, *(ROOT / "docs").glob("*.md")))
    assert not [version for version in versions if version not in told]


def test_the_oldest_versions_are_the_same_everywhere():
    """What the package asks for, what the bundle refuses, and where the matrix begins."""
    matrix = load_script("tools/test_matrix.py")
    (transformers_oldest, torch_oldest) = (
        re.search(rf'"{name}>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
        for name in ("transformers", "torch")
    )
    assert transformers_oldest == ".".join(map(str, compatibility_jina_vlm.OLDEST))
    assert matrix.TRANSFORMERS[0].startswith(f"{transformers_oldest}.")
    assert matrix.TORCH[0].startswith(f"{torch_oldest}.")


# ----------------------------------------------------------------------------------------------------------------------
# The bundle
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", generated.MODULES)
def test_module_imports_little(name):
    """Also what it imports inside functions: the library reads a bundle's imports without running it."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in generated.MODULES, f"{name} imports .{node.module}"
            continue
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in imported:
            top = module.partition(".")[0]
            assert top in ALLOWED_IMPORTS or top in sys.stdlib_module_names, f"{name} imports {module}"


def test_imports_go_one_way():
    """Conversion, geometry and loading import nothing of ours, processing never the model, the model never the processor."""
    allowed = {
        "compatibility": set(),
        "conversion": set(),
        "control_tokens": set(),
        "messages": set(),
        "configuration": {"compatibility", "conversion"},
        "tiling": set(),
        "image_loading": set(),
        "image_processing": {"conversion", "image_loading", "tiling"},
        "processing": {"compatibility", "control_tokens", "conversion", "image_processing", "messages"},
        "checkpoint": {"conversion"},
        "generation": {"compatibility"},
        "modeling": {"checkpoint", "compatibility", "configuration", "conversion", "generation", "tiling"},
    }
    for name, others in allowed.items():
        tree = ast.parse((ROOT / f"{name}_jina_vlm.py").read_text(encoding="utf-8"))
        ours = {node.module.removesuffix("_jina_vlm") for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
        assert ours <= others, name


@pytest.mark.parametrize("name", [*generated.MODULES, "__init__.py"])
def test_module_names_its_licence(name):
    assert "Apache License" in (ROOT / name).read_text(encoding="utf-8").partition("\n")[0]
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
