"""The repository itself: files made from others are in step, README and docs are right, the bundle needs little."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jina_vlm
import pytest
import torch
import transformers
from jina_vlm import compatibility_jina_vlm


ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "experiments" / "README.md"])
ALLOWED_IMPORTS = {
    "torch",
    "numpy",
    "PIL",
    "transformers",
    "huggingface_hub",
    "safetensors",
}  # transformers brings the last two


def load_script(path: str):
    """A script of the repository as a module, wherever pytest was started."""
    spec = importlib.util.spec_from_file_location(f"_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generated = load_script("scripts/generated_files.py")


# ---------------------------------------------------------------------------------------------------------------------
# Files made from others
# ---------------------------------------------------------------------------------------------------------------------


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
            assert {k: v for k, v in made.items() if k not in parts} == {
                k: v for k, v in stored.items() if k not in parts
            }


def test_root_generation_config_suppresses_structural_tokens():
    config = jina_vlm.JinaVLMConfig()
    generation_config = transformers.GenerationConfig.from_pretrained(ROOT)
    assert generation_config.suppress_tokens == config.structural_token_ids
    assert generation_config.eos_token_id == generation_config.bos_token_id == generation_config.pad_token_id == 151643


@pytest.mark.parametrize("folder", [generated.TINY, generated.TINY_RETRIEVAL], ids=lambda folder: folder.name)
def test_checkpoints_hold_the_roots_modules_and_template(folder):
    copies = generated.copies(folder)
    assert "processing_jina_vlm.py" in copies and "chat_template.jinja" in copies
    for name, content in copies.items():
        path = folder / name
        assert path.is_file() and not path.is_symlink(), f"{name}: run `make bundle`"
        assert path.read_bytes() == content, f"{name} differs from the root's: run `make bundle`"


# ---------------------------------------------------------------------------------------------------------------------
# README and docs
# ---------------------------------------------------------------------------------------------------------------------


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def heading_anchors(page: Path) -> set[str]:
    """What the headings of a page are linked to by."""
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_readme_is_short():
    text = read(README)
    assert text.count("\n") <= 200 and len(text.encode()) <= 12_000


def test_parameters_are_those_of_the_docs():
    parameters = load_script("benchmarks/parameters.py")
    parts = parameters.count(jina_vlm.JinaVLMConfig.from_pretrained(ROOT))
    assert parts["Total"] == sum(number for part, number in parts.items() if part != "Total")
    assert parts["Total"] == 2_450_807_760
    assert parameters.table(parts) in read(ROOT / "docs" / "architecture.md"), "run `make parameters`"
    with torch.device("meta"):
        model = jina_vlm.JinaVLMForConditionalGeneration(jina_vlm.JinaVLMConfig())
    assert model.num_parameters() == parts["Total"]


def test_token_counts_of_the_readme(processor):
    rows = re.findall(r"^\| (\d+) x (\d+) \| (.*) \|$", read(README), flags=re.MULTILINE)
    assert len(rows) >= 3
    for width, height, cells in rows:
        size = (int(height), int(width))
        for max_tiles, cell in zip((1, 4, 12), cells.split(" | "), strict=True):
            grid = processor.image_processor.get_tiling(*size, max_tiles=max_tiles)[1]
            counted = processor._get_num_multimodal_tokens([size], max_tiles=max_tiles)["num_image_tokens"][0]
            assert cell == f"{grid[0]} x {grid[1]}: {counted:,}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_snippets_are_python(page):
    for snippet in re.findall(r"^ *```python\n(.*?)^ *```", read(page), flags=re.MULTILINE | re.DOTALL):
        ast.parse(textwrap.dedent(snippet))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_tables_are_whole(page):
    """Every row has as many cells as the table's head."""
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", re.sub("`[^`]*`", "", row))) for row in table.splitlines()}) == 1, (
            table
        )


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(#[^)]+)?\)", read(page)):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), f"{target} leads out of the repository"
        assert not anchor or anchor[1:] in heading_anchors(linked), f"{target}{anchor}"


def runs(module: str) -> bool:
    """Whether `python -m` of it does something: importing one that has no main does nothing, and succeeds."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{module}.__main__")
        return spec is not None
    return spec is not None and '__name__ == "__main__"' in read(Path(spec.origin))


# What was true of an older layout is told in the changelog.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=page_name)
def test_what_a_page_names_is_there(page):
    """Modules, files, verbs of the command, make targets, and what picks tests out."""
    text = read(page)
    for module in re.findall(r"-m ((?:benchmarks|evaluation|experiments|jina_vlm_tools|scripts)[\w.]*)", text):
        assert runs(module), f"python -m {module}"
    tops = "benchmarks|checkpoints|docs|evaluation|experiments|jina_vlm_tools|requirements|scripts|tests"
    for path in re.findall(rf"(?<![\w/.])((?:{tops})/[\w./*-]*\w)", text):
        assert list(ROOT.glob(path)), path
    listed = subprocess.run(
        [sys.executable, "-m", "jina_vlm_tools", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    code = "\n".join(
        [*re.findall(r"^ *```sh\n(.*?)```", text, re.MULTILINE | re.DOTALL), *re.findall("`([^`\n]+)`", text)]
    )
    for verb in re.findall(r"^\s*jina-vlm ([a-z]+)", code, flags=re.MULTILINE):
        assert re.search(rf"^\s+{verb}\b", listed, flags=re.MULTILINE), f"jina-vlm {verb}"
    for targets in re.findall(r"^\s*make ((?:[a-z-]+ ?)+)", code, flags=re.MULTILINE):
        for target in targets.split():
            assert re.search(rf"^{target}:", read(ROOT / "Makefile"), flags=re.MULTILINE), f"make {target}"
    tests = " ".join(path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py"))
    sources = "".join(read(path) for path in ROOT.glob("tests/**/*.py"))
    for expression in re.findall(r"""-k (?:'([^']+)'|"([^"]+)"|([\w.]+))""", text):
        for word in set("".join(expression).split()) - {"or", "and", "not"}:
            assert word in tests or re.search(rf"def test_\w*{word}", sources), f"-k {word}"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_its_targets():
    listed = subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, check=True
    ).stdout
    for target in (
        "demo",
        "test",
        "test-slow",
        "test-newest",
        "test-matrix",
        "train-tiny",
        "eval-tiny",
        "bundle",
        "root-files",
        "clean",
    ):
        assert re.search(rf"^\s+make {target}\s+\S", listed, flags=re.MULTILINE), target


def test_versions_named_are_those_of_the_matrix():
    command = [sys.executable, "-m", "scripts.test_matrix", "--list"]
    cells = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    named = [re.fullmatch(r"python(.+)-transformers(.+)-torch(.+)", cell).groups() for cell in cells]
    told = read(ROOT / "docs" / "verification.md")
    assert named and not [version for cell in named for version in cell if version not in told]


def test_other_files_name_the_versions_that_count():
    assert f"\nversion: {jina_vlm.__version__}\n" in read(ROOT / "CITATION.cff")
    ruff = re.search(r"^RUFF := (.*)$", read(ROOT / "Makefile"), flags=re.MULTILINE)[1]
    assert f"rev: v{ruff}\n" in read(ROOT / ".pre-commit-config.yaml")


def test_the_oldest_versions_are_the_same_everywhere():
    """What the package asks for, what the bundle refuses, and where the matrix begins."""
    matrix = load_script("scripts/test_matrix.py")
    (transformers_oldest, torch_oldest) = (
        re.search(rf'"{name}>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
        for name in ("transformers", "torch")
    )
    assert transformers_oldest == ".".join(map(str, compatibility_jina_vlm.OLDEST))
    assert matrix.TRANSFORMERS[0].startswith(f"{transformers_oldest}.")
    assert matrix.TORCH[0] == torch_oldest


# ---------------------------------------------------------------------------------------------------------------------
# The bundle
# ---------------------------------------------------------------------------------------------------------------------


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
    """Conversion, geometry and loading import nothing of ours, processing never the model, the model never the
    processor."""
    allowed = {
        "compatibility": set(),
        "conversion": {"compatibility"},
        "control_tokens": set(),
        "arguments": set(),
        "chat": set(),
        "configuration": {"compatibility", "conversion", "tiling"},
        "tiling": set(),
        "image_loading": set(),
        "resizing": {"image_loading"},
        "image_processing": {"arguments", "compatibility", "conversion", "image_loading", "resizing", "tiling"},
        "processing": {
            "arguments",
            "chat",
            "compatibility",
            "control_tokens",
            "conversion",
            "image_loading",
            "image_processing",
            "samples",
        },
        "samples": {"tiling"},
        "checkpoint": {"conversion"},
        "generation": {"compatibility"},
        "modeling": {"checkpoint", "compatibility", "configuration", "conversion", "generation", "samples", "tiling"},
    }
    for name, others in allowed.items():
        tree = ast.parse((ROOT / f"{name}_jina_vlm.py").read_text(encoding="utf-8"))
        ours = {
            node.module.removesuffix("_jina_vlm")
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level
        }
        assert ours <= others, name


def test_commands_are_on_top():
    """Nothing that they are made of imports them."""
    package = ROOT / "jina_vlm_tools"
    importing = [path for path in package.rglob("*.py") if "jina_vlm_tools.cli" in path.read_text(encoding="utf-8")]
    others = {path.relative_to(package).as_posix() for path in importing if path.parent != package / "cli"}
    assert others == {"__main__.py", "webapp/space/app.py"}


@pytest.mark.parametrize("name", [*generated.MODULES, "__init__.py"])
def test_module_names_its_license(name):
    assert "Apache License" in (ROOT / name).read_text(encoding="utf-8").partition("\n")[0]
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
