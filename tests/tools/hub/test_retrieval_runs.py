"""What is published of a retrieval folder embeds: the whole way to a page and back by the page's own code, and to a
merged folder. Also run by `make test-retrieval`, whose environment has sentence-transformers."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, largest_file, make_image, python
from hub_client import TOKEN
from miniature import save_miniature
from PIL import Image
from retrieval_folder import save_retrieval_folder
from safetensors.torch import load_file

from jina_vlm_tools.cli.main import main
from jina_vlm_tools.files import TINY


pytest.importorskip("sentence_transformers")

CARD = "---\nlicense: cc-by-nc-4.0\nlanguage: [en, de]\n---\n"
# What the page's blocks leave behind, compared
READER = """
import contextlib, io, json, os, sys
import torch

os.chdir(sys.argv[1])

def run(code):
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), names)
    return names, out.getvalue()

def cosine(one, other):
    one, other = torch.as_tensor(one).float(), torch.as_tensor(other).float()
    one, other = (torch.nn.functional.normalize(some[..., : one.shape[-1]], dim=-1) for some in (one, other))
    return 1 - (one - other).square().sum(-1).max().item() / 2  # of a first token that is zeros, too

blocks = json.loads(open("blocks.json").read())
(late, printed), (dense, more), (peft, answer) = (run(blocks[index]) for index in (0, 1, 3))
assert "jina_vlm" not in sys.modules
code = type(peft["model"].get_base_model()).__module__
ours, found = run(blocks[2])
print(json.dumps({
    "prompts": [late["model"].prompts, dense["model"].prompts],
    "late, ours": cosine(late["pages"][0], ours["found"].multi[0]),
    "late queries, ours": cosine(late["queries"][0], ours["queries"].multi[0]),
    "dense, ours": cosine(dense["pages"][0], ours["found"].dense[0]),
    "dense queries, ours": cosine(dense["queries"][0], ours["queries"].dense[0]),
    "peft, ours": cosine(peft["page"], ours["found"].dense[0]),
    "widths": [len(dense["pages"][0]), len(ours["found"].dense[0]), late["pages"][0].shape[-1]],
    "tokens": [len(vectors) for vectors in late["pages"]],
    "printed": [printed, more, answer, found],
    "code": code,
}))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base, and beside it an adapter that names it by its place."""
    home = tmp_path_factory.mktemp("home")
    (save_miniature(home / "base") / "README.md").write_text(CARD)
    save_retrieval_folder(home / "retrieval", home / "base", "../base")
    return home


def dims_of(home: Path) -> list[int]:
    return json.loads((home / "base" / "config.json").read_text())["matryoshka_dimensions"]


def test_from_a_folder_to_a_page_and_back_by_the_page_s_own_code(hub, home, tmp_path, capsys):
    hub.put("me/base", home / "base")
    arguments = ["upload", "--adapter", str(home / "retrieval"), "--repo-id", "me/page", "--base", "me/base", "--json"]
    main(arguments)
    report = json.loads(capsys.readouterr().out)
    repository = hub.repositories["me/page"]
    assert [commit.message for commit in repository.commits.values()] == [
        "initial commit",
        "Upload adapter, projector, code and card",
    ]
    assert report["url"] == f"{hub.url}/me/page/commit/{repository.refs['refs/heads/main']}"
    assert report["base"] == "me/base" and report["base_commit"] == hub.repositories["me/base"].refs["refs/heads/main"]
    assert report["license"] == "cc-by-nc-4.0" and report["answer"]
    assert report["shapes"]["dense"] == [[1, 32], [1, 32]]
    assert report["shapes"]["multi"][1][0] > 200 > report["shapes"]["multi"][0][0]
    assert min(report["agreement"].values()) > 0.999
    files = hub.files("me/page")
    del files[".gitattributes"]
    assert {name: len(content) for name, content in files.items()} == report["files"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert b"base_model: me/base\n" in files["README.md"] and str(home).encode() not in b"".join(files.values())

    # whoever reads the page: its blocks for Python, but that for a server, loading from the Hub
    blocks = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    assert len(blocks) == 5 and "requests.post" in blocks[-1]
    (tmp_path / "blocks.json").write_text(json.dumps(blocks[:-1]))
    for seed, name in enumerate(("page.png", "other.png")):
        Image.fromarray(make_image(180, 240 + 200 * seed, seed=seed)).save(tmp_path / name)
    # The warning is of PEFT's own calls.
    said = python(
        READER, tmp_path, HF_HOME=str(tmp_path / "reader"), HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url,
        HF_HUB_DISABLE_XET="1", no_proxy="127.0.0.1,localhost", PYTHONPATH=str(ROOT),
        PYTHONWARNINGS="ignore::FutureWarning",
    ).stdout  # fmt: skip
    read = json.loads(said.splitlines()[-1])
    assert min(read[name] for name in read if name.endswith("ours")) > 0.999, read
    assert read["prompts"] == [{"query": "Query:", "document": "Passage:"}] * 2
    assert read["widths"] == [dims_of(home)[-1], 32, 16]
    assert read["tokens"][1] > read["tokens"][0] > 200, "the path was taken for a text"
    assert all(read["printed"]) and read["code"].startswith("transformers_modules.me.base.")


def test_a_base_that_the_hub_has_not_is_told_before_anything_is_sent(hub, home):
    with pytest.raises(SystemExit) as stopped:
        main(["upload", "--adapter", str(home / "retrieval"), "--repo-id", "me/page", "--base", "me/base"])
    assert "Repository Not Found" in stopped.value.code and "Check the name" in stopped.value.code
    assert not hub.repositories and TOKEN not in stopped.value.code


def test_merged_folder(home, tmp_path, capsys):
    """It embeds as what it was made of, which the command sees to; --yes replaces it and nothing else."""
    merged = tmp_path / "merged"
    arguments = ["merge", str(home / "retrieval"), str(merged), "--dense", "--dtype", "float32"]
    main(arguments)
    said = capsys.readouterr().out
    assert "It embeds (dense): a text as 1 x 32, an image as 1 x 32; cosine 1.0000" in said
    assert said.endswith(f"It is in {merged}.\n")
    modules = [module["type"].rpartition(".")[2] for module in json.loads((merged / "modules.json").read_text())]
    assert modules == ["Transformer", "Pooling", "Normalize"] and (merged / "CODE_LICENSE").is_file()
    weights, base = load_file(merged / "model.safetensors"), load_file(home / "base" / "model.safetensors")
    changed = {name for name in weights if not weights[name].equal(base[f"model.{name}"].float())}
    assert changed and all("_proj.weight" in name and "language_model" in name for name in changed)
    before = {path: path.read_bytes() for path in merged.rglob("*") if path.is_file()}
    (merged / "thesis.tex").touch()
    for more, message in (([], "say --yes"), (["--yes"], "holds thesis.tex, which belongs to no merged folder")):
        with pytest.raises(SystemExit, match=re.escape(message)):
            main([*arguments, *more])
    (merged / "thesis.tex").unlink()
    assert {path: path.read_bytes() for path in merged.rglob("*") if path.is_file()} == before


def test_what_cannot_be_merged(home, tmp_path):
    for source, message in (
        (str(tmp_path / "no"), "neither a folder nor the name of a repository"),
        (str(TINY), "holds no adapter: there is no adapter_config.json"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            main(["merge", source, str(tmp_path / "out"), "--multi"])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(home, tmp_path):
    with largest_file(100_000), pytest.raises(SystemExit, match="merged folder could not be written.*Make room"):
        main(["merge", str(home / "retrieval"), str(tmp_path / "out"), "--dense"])
    assert not list(tmp_path.iterdir())
