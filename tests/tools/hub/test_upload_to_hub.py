"""Publishing: from a checkpoint to a page on the Hub, with the real client against a server that speaks the Hub's
protocol."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jina_vlm
import pytest
import torch
from answers import prepare
from conftest import ROOT, largest_file, make_image, python
from hub_client import STRANGERS, TOKEN, point_to
from hub_server import GITATTRIBUTES, Fault, serve_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from mlx_copy import save_mlx_copy
from PIL import Image
from safetensors.torch import load_file, save_file

import upload_to_hub
from jina_vlm_tools.cli.main import main, parse_args
from jina_vlm_tools.files import TINY, new_folder
from jina_vlm_tools.hub import PublishingError
from jina_vlm_tools.hub.assemble import assemble, cover_structural_rows
from jina_vlm_tools.hub.card import write_card
from jina_vlm_tools.hub.check import ask, list_bundle
from jina_vlm_tools.hub.origin import Origin, find_origin
from jina_vlm_tools.hub.push import Target, compare, find_target, push


ORIGIN = Origin(license="mit", text="The weights come from a test")
CARD = "---\nlicense: cc-by-nc-4.0\nlanguage: en\n---\nThe released layout.\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """checkpoints/tiny as it is published, in three files of weights."""
    folder = tmp_path_factory.mktemp("bundle")
    write_card(folder, "me/page", ORIGIN, assemble(str(TINY), folder, max_shard_size="2MB").changes)
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


def upload(folder: Path, repo_id: str = "me/page", token: str | None = None, private: bool = False, **where) -> str:
    """What `upload_to_hub.py` does once the folder is assembled."""
    api = HfApi(token=token)
    return push(
        api, folder, list_bundle(folder), find_target(api, repo_id, private=private, **where), "Upload", private
    )


def run(monkeypatch, *args) -> str:
    """The command in this process, which ends with an error: what it says."""
    monkeypatch.setattr(sys, "argv", ["upload_to_hub.py", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        upload_to_hub.main()
    assert isinstance(ended.value.code, str), "it ended without an error"
    return ended.value.code


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sent(hub, method: str, path: str) -> list:
    return [request for request in hub.requests if request.method == method and re.search(path, request.path)]


def published(hub, repo_id: str = "me/page", revision: str = "main") -> dict[str, bytes]:
    files = hub.files(repo_id, revision)
    assert files.pop(".gitattributes").decode() == GITATTRIBUTES
    return files


# ---------------------------------------------------------------------------------------------------------------------
# The whole way
# ---------------------------------------------------------------------------------------------------------------------


def test_from_the_released_layout_to_a_page_that_loads_by_its_own_code(released_folder, model, chat, tmp_path):
    """The command as people run it, from one repository of the Hub to another, with the client's log wide open; then
    the page's own code, as printed on it."""
    Image.fromarray(make_image(150, 100)).save(tmp_path / "photo.png")
    shutil.copytree(released_folder, tmp_path / "released").chmod(0o755)
    (tmp_path / "released" / "README.md").write_text(CARD)
    with serve_hub({TOKEN: "me"}, part_size=150_000) as hub:
        hub.create("me/released", private=True)
        source = hub.put("me/released", tmp_path / "released")
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "home"),
            "TMPDIR": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
            "no_proxy": "127.0.0.1,localhost", "HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [
            sys.executable,
            str(ROOT / "upload_to_hub.py"),
            "--weights",
            "me/released",
            "--repo-id",
            "me/bundle",
        ]
        result = subprocess.run(
            [*command, "--max-shard-size", "300KB"], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert (
            "Asked about a drawing, it begins: " in result.stdout
            and f"Done, and equal to what was sent: {hub.url}/me/bundle/commit/" in result.stdout
        )
        files = published(hub, "me/bundle")
        assert {
            "model.safetensors.index.json",
            "modeling_jina_vlm.py",
            "README.md",
            "CODE_LICENSE",
            "tokenizer.json",
        } <= set(files)
        for name, content in files.items():
            assert re.search(rf"^ *{len(content):,}  {re.escape(name)}$", result.stdout, re.MULTILINE)
        assert sent(hub, "POST", "complete_multipart"), "no file was large enough to go in parts"
        page = files["README.md"].decode()
        assert (
            "license: cc-by-nc-4.0\n" in page and "base_model: me/released\n" in page and f"commit `{source}`" in page
        )

        said = (result.stdout + result.stderr).encode()
        assert b"whoami-v2" in said, "the log was not open"
        written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        assert not [text for text in (said, *written, *files.values()) if TOKEN.encode() in text]

        # whoever reads the page, without a token
        commit = hub.repositories["me/bundle"].refs["refs/heads/main"]
        code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
        code = f"""
import os, sys
os.chdir(sys.argv[1])
{code}
assert "jina_vlm" not in sys.modules and type(model).__module__.startswith("transformers_modules.me.bundle.{commit}")
print(ids.tolist())
from transformers import AutoModelForImageTextToText
old = AutoModelForImageTextToText.from_pretrained(
    "me/bundle", trust_remote_code=True, revision="{commit}", code_revision="{commit}"
)
print(old.generate(**inputs, max_new_tokens=64).tolist())
"""
        online = {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "no_proxy": "127.0.0.1,localhost",
        }
        *_, first, second = python(code, tmp_path, HF_HOME=str(tmp_path / "reader"), **online).stdout.splitlines()
    inputs = chat([("user", Image.open(tmp_path / "photo.png"), "Describe the image.")], add_generation_prompt=True)
    assert json.loads(first) == json.loads(second) == model.generate(**inputs, max_new_tokens=64).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Assembling
# ---------------------------------------------------------------------------------------------------------------------


def test_published_weights_are_the_checkpoints_but_for_the_rows_of_structural_tokens(bundle):
    before = load_file(TINY / "model.safetensors")
    after = {name: tensor for file in bundle.glob("*.safetensors") for name, tensor in load_file(file).items()}
    structural = jina_vlm.JinaVLMConfig.from_pretrained(TINY).structural_token_ids
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "lm_head.weight")
    head, old = after["lm_head.weight"], before["lm_head.weight"]
    others = [row for row in range(len(head)) if row not in structural]
    assert torch.equal(head[others], old[others])
    assert torch.equal(head[structural], old[min(structural) - 1].expand(len(structural), -1))
    assert not torch.equal(head, old)


def test_answers_stay_what_they_were(bundle):
    """Greedy and sampled ones, on the trained checkpoint, whose rows of structural tokens were trained too."""
    processor = jina_vlm.JinaVLMProcessor.from_pretrained(TINY)
    models = [
        jina_vlm.JinaVLMForConditionalGeneration.from_pretrained(f, dtype=torch.float32).eval() for f in (TINY, bundle)
    ]
    inputs = prepare(processor, [make_image(200, 260), "Describe the picture."])
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 2.0}):
        answers = []
        for model in models:
            torch.manual_seed(0)
            answers.append(model.generate(**inputs, max_new_tokens=24, **sampling).tolist())
        assert answers[0] == answers[1]


def test_a_tied_head_is_left_alone():
    config = jina_vlm.JinaVLMConfig.from_pretrained(TINY)
    config.tie_word_embeddings = True
    model = jina_vlm.JinaVLMForConditionalGeneration(config)
    before = model.lm_head.weight.clone()
    assert cover_structural_rows(model) is False
    assert model.lm_head.weight is model.get_input_embeddings().weight and torch.equal(model.lm_head.weight, before)


def test_assembling_twice_gives_the_same_bytes(bundle, tmp_path):
    """So that an upload that is begun anew finds its large files; also from what was assembled before."""
    for number, source in enumerate((TINY, bundle)):
        folder = tmp_path / str(number)
        folder.mkdir()
        assemble(str(source), folder, max_shard_size="2MB")
        again = contents(folder)
        assert again == {name: content for name, content in contents(bundle).items() if name != "README.md"}


def test_template_and_dtype(released_folder, tmp_path):
    """A checkpoint's own chat template is kept; where it brings none, this repository's is put there."""
    checkpoint = shutil.copytree(released_folder, tmp_path / "checkpoint")
    made = []
    for number in range(2):
        made.append(tmp_path / str(number))
        made[-1].mkdir()
        changes = assemble(str(checkpoint), made[-1], dtype="bfloat16").changes
        checkpoint.chmod(0o755)
        (checkpoint / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    templates = [(folder / "chat_template.jinja").read_text() for folder in made]
    assert templates == [(ROOT / "chat_template.jinja").read_text(), "{{ messages[0]['content'] }}"]
    assert {tensor.dtype for tensor in load_file(made[0] / "model.safetensors").values()} == {torch.bfloat16}
    assert "released layout" in changes[0] and changes[1] == "They were cast to bfloat16."


def test_a_missing_shard_is_named(copy, tmp_path, monkeypatch):
    (copy / "model-00002-of-00003.safetensors").unlink()
    said = run(monkeypatch, "--weights", copy, "--output", tmp_path / "out", "--origin", "me/base")
    assert "lacks model-00002-of-00003.safetensors" in said and "Fetch the missing ones" in said
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}


def test_a_disk_that_is_too_small_is_told_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    monkeypatch.setattr(jina_vlm.JinaVLMForConditionalGeneration, "save_pretrained", None)
    said = run(monkeypatch, "--weights", TINY, "--output", tmp_path / "out")
    assert "0.00 GB are free, 0.04 GB are needed" in said and "Make room" in said
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, monkeypatch):
    with largest_file(1_000_000):
        said = run(monkeypatch, "--weights", TINY, "--output", tmp_path / "out")
    assert "could not be written" in said and "Make room there" in said
    assert not list(tmp_path.iterdir())


def test_a_folder_is_there_as_a_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), new_folder(target) as made:
        (made / "half").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with new_folder(target) as made:
        (made / "first").touch()
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), new_folder(target, replace=True):
        raise KeyboardInterrupt
    assert os.listdir(target) == ["first"]
    with new_folder(target, replace=True) as made:
        (made / "second").touch()
        assert os.listdir(target) == ["first"]
    assert os.listdir(target) == ["second"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_a_folder_may_read_its_weights(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with new_folder(tmp_path / "out") as made:
            save_file({"weight": torch.zeros(2)}, made / "model.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == mode


def test_what_is_in_the_output_is_replaced_only_if_it_is_a_bundle_and_one_says_so(copy, monkeypatch):
    before = contents(copy)
    assert "say --yes" in run(monkeypatch, "--weights", TINY, "--output", copy)
    (copy / "thesis.tex").write_text("years of work")
    said = run(monkeypatch, "--weights", TINY, "--output", copy, "--yes")
    assert "no checkpoint that --yes could replace" in said and "thesis.tex" in said
    assert contents(copy) == before | {"thesis.tex": b"years of work"}


def test_a_copy_for_mlx_is_fetched_by_its_name(hub, released_folder, tmp_path):
    save_mlx_copy(released_folder, tmp_path / "copy", group_size=32)
    (tmp_path / "copy" / "README.md").write_text(CARD)
    (tmp_path / "copy" / "modeling_jvlm.py").write_text("raise RuntimeError('the code of others')")
    hub.create("me/mlx")
    commit = hub.put("me/mlx", tmp_path / "copy")
    for source, folder in ((str(tmp_path / "copy"), tmp_path / "here"), ("me/mlx", tmp_path / "fetched")):
        folder.mkdir()
        assembled = assemble(source, folder)
    assert assembled.commit == commit and "MLX's layout" in assembled.changes[0]
    assert contents(tmp_path / "here") == contents(tmp_path / "fetched")
    assert not sent(hub, "GET", r"\.py|\.md")


# ---------------------------------------------------------------------------------------------------------------------
# Checks before anything is sent
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / ".env").write_text("secret"), "holds .env, which belongs to no bundle"),
        (lambda folder: (folder / "runs").mkdir(), "holds runs"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "holds model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (
            lambda folder: (folder / "model-00003-of-00003.safetensors").unlink(),
            "lacks model-00003-of-00003.safetensors",
        ),
        (lambda folder: (folder / "modeling_jina_vlm.py").open("a").write("#"), "modeling_jina_vlm.py .* differs"),
    ],
    ids=["a secret", "a folder", "other weights", "no tokenizer", "a shard missing", "other code"],
)
def test_a_bundle_holds_its_files_and_nothing_else(copy, change, message):
    assert list_bundle(copy) == sorted(path.name for path in copy.iterdir())
    change(copy)
    with pytest.raises(PublishingError, match=message):
        list_bundle(copy)


def test_a_bundle_that_lacks_weights_or_computes_no_numbers_is_refused(copy):
    file = copy / "model-00003-of-00003.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    save_file({**tensors, name: tensors[name] * float("nan")}, file, metadata={"format": "pt"})
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    other = next(n for n, shard in index["weight_map"].items() if shard != file.name and n.endswith("k_proj.bias"))
    other_file = copy / index["weight_map"].pop(other)
    save_file({n: t for n, t in load_file(other_file).items() if n != other}, other_file, metadata={"format": "pt"})
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PublishingError, match=rf"missing_keys: {re.escape(other)}; logits that are no finite numbers"):
        ask(copy)


def test_a_bundle_is_asked_alone_and_without_the_token(copy, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with (copy / "modeling_jina_vlm.py").open("a") as file:
        file.write(
            "\nimport os, sys\ntry:\n    import jina_vlm\nexcept ImportError as error:\n"
            "    raise RuntimeError(f'{error} {dict(os.environ)} {sys.path}')\n"
        )
    with pytest.raises(PublishingError, match="does not load by itself") as refusal:
        ask(copy)
    said = str(refusal.value)
    assert "'HF_HUB_OFFLINE': '1'" in said and "import of jina_vlm halted" in said
    assert TOKEN not in said and "PYTHONPATH" not in said and f"'{ROOT}'" not in said


# ---------------------------------------------------------------------------------------------------------------------
# Sending
# ---------------------------------------------------------------------------------------------------------------------


def test_one_commit_holds_the_bundle(hub, bundle):
    url = upload(bundle, private=True)
    repository = hub.repositories["me/page"]
    assert published(hub) == contents(bundle) and repository.private
    assert [commit.message for commit in repository.commits.values()] == ["initial commit", "Upload"]
    assert url == f"{hub.url}/me/page/commit/{repository.refs['refs/heads/main']}"
    assert set(repository.large) == {
        f.sha256 for f in list(repository.commits.values())[-1].files.values() if f.sha256
    }


def test_a_dropped_connection_is_retried(hub, bundle):
    hub.faults += [Fault("PUT", "/storage", cut_request=100_000), Fault("POST", "/preupload/", status=503)]
    upload(bundle)
    assert published(hub) == contents(bundle)
    assert len(sent(hub, "PUT", "/storage")) == 4 and len(sent(hub, "POST", "/preupload/")) == 2


def test_an_interrupted_upload_leaves_the_target_as_it_was_and_goes_on_where_it_stopped(hub, bundle, copy):
    upload(bundle)
    before, head = contents(bundle), hub.repositories["me/page"].refs["refs/heads/main"]
    for shard in copy.glob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})

    # one file arrives; then the line is dead, for longer than the client tries
    hub.faults += [Fault("PUT", "/storage"), Fault("PUT", "/storage", cut_request=50_000, times=1000)]
    with pytest.raises(RuntimeError, match="Error while uploading"):
        upload(copy, replace=True)
    assert published(hub) == before and hub.repositories["me/page"].refs["refs/heads/main"] == head

    hub.faults[:] = [Fault("POST", "/commit/", status=500)]
    hub.requests.clear()
    with pytest.raises(HfHubHTTPError):
        upload(copy, replace=True)
    assert published(hub) == before and hub.repositories["me/page"].refs["refs/heads/main"] == head
    assert len(sent(hub, "PUT", "/storage")) == 2, "what had arrived was sent again"

    hub.requests.clear()
    upload(copy, replace=True)
    assert published(hub) == contents(copy) and not sent(hub, "PUT", "/storage")


def test_an_upload_that_began_with_a_new_repository_or_branch_goes_on_without_yes(hub, bundle, tmp_path):
    (tmp_path / "notes.txt").write_text("old")
    hub.put("me/old", tmp_path)
    for repo_id, revision in (("me/new", "main"), ("me/branch", "v2"), ("me/old", "v2")):
        hub.faults.append(Fault("POST", "/commit/", status=500))
        with pytest.raises(HfHubHTTPError):
            upload(bundle, repo_id, revision=revision)
        upload(bundle, repo_id, revision=revision)
        assert published(hub, repo_id, revision) == contents(bundle)
    assert not published(hub, "me/branch") and set(published(hub, "me/old")) == {"notes.txt"}


def test_an_existing_repository_is_replaced_only_with_yes(hub, bundle, tmp_path, monkeypatch):
    for name in ("model.safetensors", "notes.txt", "sub/more.txt"):
        (tmp_path / "old" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "old" / name).write_text(name)
    old = hub.put("me/page", tmp_path / "old")
    with pytest.raises(PublishingError, match=r"holds 3 files on main: .*notes.txt.*--yes"):
        upload(bundle)
    assert "me/page holds 3 files" in run(monkeypatch, "--weights", TINY, "--repo-id", "me/page")
    assert not [request for request in hub.requests if request.method == "POST"]
    upload(bundle, replace=True)
    # an old model.safetensors would be loaded in the place of the new shards
    assert published(hub) == contents(bundle)
    assert set(published(hub, revision=old)) == {"model.safetensors", "notes.txt", "sub/more.txt"}


def test_pull_request_and_branch_leave_main_alone(hub, bundle, tmp_path):
    (tmp_path / "notes.txt").write_text("old")
    hub.put("me/page", tmp_path)
    before = published(hub)
    assert upload(bundle, create_pr=True, token=STRANGERS) == f"{hub.url}/me/page/discussions/1"
    assert published(hub, revision="refs/pr/1") == contents(bundle)
    upload(bundle, revision="v1/transformers")
    assert published(hub, revision="v1/transformers") == contents(bundle)
    assert published(hub) == before
    with pytest.raises(PublishingError, match="on v1/transformers: .*--yes"):
        upload(bundle, revision="v1/transformers")
    with pytest.raises(PublishingError, match="a pull request needs a repository"):
        upload(bundle, "me/nothing", create_pr=True)


def test_a_commit_of_somebody_else_meanwhile_is_not_lost(hub, bundle, tmp_path):
    api = HfApi()
    hub.create("me/page")
    target = find_target(api, "me/page")
    (tmp_path / "notes.txt").write_text("new")
    hub.put("me/page", tmp_path)
    with pytest.raises(HfHubHTTPError, match="412"):
        push(api, bundle, list_bundle(bundle), target, "Upload")
    assert set(published(hub)) == {"notes.txt"}


def test_what_arrived_is_compared_with_what_was_sent(hub, bundle):
    upload(bundle)
    repository, names, api = hub.repositories["me/page"], list_bundle(bundle), HfApi()
    files = repository.commits[repository.refs["refs/heads/main"]].files
    shard = next(name for name in names if name.endswith("1-of-00003.safetensors"))
    damaged = {name: file for name, file in files.items() if name != "config.json"}
    damaged["tokenizer.json"] = repository.store(hub.files("me/page")["tokenizer.json"][:-1])
    damaged[shard] = next(file for name, file in files.items() if name.endswith("2-of-00003.safetensors"))
    damaged["secret.txt"] = repository.store(b"x")
    commit = repository.commit("refs/heads/main", damaged, "damage", "me")
    with pytest.raises(PublishingError) as refusal:
        compare(api, "me/page", commit, bundle, names)
    for fault in (
        f"{shard} has sha256 ", "tokenizer.json has git-sha1 ", "config.json did not arrive",
        "secret.txt is there and was not sent", f"tokenizer.json has {files['tokenizer.json'].size - 1} bytes",
    ):  # fmt: skip
        assert fault in str(refusal.value)


def test_metadata_that_the_hub_refuses_make_nothing(hub, copy):
    text = (copy / "README.md").read_text()
    (copy / "README.md").write_text(text.replace("license: mit", "license: My Licence"))
    with pytest.raises(PublishingError, match='does not take the front matter .*"license" must be'):
        upload(copy)
    assert not hub.repositories


def test_the_server_is_as_strict_as_the_hub(hub):
    """What this file shows rests on it."""
    repository, session = hub.create("me/page"), huggingface_hub.utils.get_session()
    link = hub.sign(repository, "0" * 64)
    for url, headers in (
        (link, {}),  # the content has another sha256
        (link, {"authorization": f"Bearer {TOKEN}"}),
        (link.replace("localhost", "127.0.0.1"), {}),
        (link[:-1], {}),
    ):
        assert session.put(url, content=b"x", headers=headers).status_code in (400, 403)
    operation = {"key": "lfsFile", "value": {"path": "a.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 1}}
    lines = [{"key": "header", "value": {"summary": "x"}}, operation]
    answer = session.post(
        f"{hub.url}/api/models/me/page/commit/main",
        content="\n".join(map(json.dumps, lines)),
        headers={"authorization": f"Bearer {TOKEN}"},
    )
    assert answer.status_code == 400 and not repository.large and not published(hub)
    hub.create("me/secret", private=True)
    for token in (STRANGERS, False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).repo_info("me/secret")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_no_token(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    said = run(monkeypatch, "--weights", TINY, "--repo-id", "me/page")
    assert "no token" in said and "hf auth login" in said and "HF_TOKEN" in said
    assert not hub.requests


def test_a_token_that_the_hub_does_not_know(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_WrongToken9876543210")
    said = run(monkeypatch, "--weights", TINY, "--repo-id", "me/page")
    assert "Invalid user token" in said and "correct HF_TOKEN" in said and "hf_WrongToken9876543210" not in said
    assert not hub.repositories


def test_a_request_without_a_token_is_refused_by_the_hub(hub, bundle):
    with pytest.raises(HfHubHTTPError, match="401"):
        push(HfApi(token=False), bundle, list_bundle(bundle), Target("me/page"), "Upload")
    assert not hub.repositories


def test_a_name_that_belongs_to_somebody_else(hub, bundle):
    with pytest.raises(HfHubHTTPError, match="403"):
        upload(bundle, "you/page")
    assert not hub.repositories


def test_no_network(hub, monkeypatch):
    point_to(monkeypatch, "http://127.0.0.1:9")
    said = run(monkeypatch, "--weights", TINY, "--repo-id", "me/page")
    assert "http://127.0.0.1:9 cannot be reached" in said and "Check the network" in said


def test_weights_that_are_nowhere(hub, monkeypatch, tmp_path):
    said = run(monkeypatch, "--weights", "me/nothing", "--dry-run")
    assert "Repository Not Found" in said and "Check the name" in said
    point_to(monkeypatch, "http://127.0.0.1:9")
    assert "connection" in run(monkeypatch, "--weights", "me/nothing", "--dry-run")
    said = run(monkeypatch, "--weights", tmp_path, "--dry-run", "--license", "mit", "--origin", "me/base")
    assert str(tmp_path) in said and "config.json" in said
    assert "neither a folder nor" in run(monkeypatch, "--weights", tmp_path / "nothing", "--dry-run")


@pytest.mark.parametrize("code", [403, 500])
def test_what_to_do_about_a_refusal_is_told_by_who_reads_and_who_writes(hub, monkeypatch, tmp_path, code):
    writing = "The token may not write there" if code == 403 else "files that have arrived are not sent twice"
    reading = "The token may not read it" if code == 403 else "Run the same command again."
    hub.faults += [Fault("GET", "/me/", code, times=1000)]
    said = run(monkeypatch, "--weights", TINY, "--repo-id", "me/page")
    assert writing in said and "Nothing is half-written there" in said
    with pytest.raises(SystemExit) as ended:
        main(["convert", "me/weights", str(tmp_path / "made")])
    assert reading in ended.value.code
    assert not [words for words in ("write", "half-written", "sent", "--create-pr") if words in ended.value.code]


def test_results_are_read_before_the_weights(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("jina_vlm_tools.hub.assemble.assemble", None)
    for what in (("--weights", TINY), ("--adapter", TINY.parent / "tiny-retrieval")):
        said = run(monkeypatch, *what, "--repo-id", "me/page", "--results", tmp_path / "typo.json")
        assert "typo.json: FileNotFoundError" in said
    assert not hub.requests


def test_private_is_not_promised_of_a_public_repository(hub, bundle):
    hub.create("me/page")
    with pytest.raises(PublishingError, match="is public, and stays so"):
        upload(bundle, private=True, replace=True)


@pytest.mark.parametrize("name", ["page", "me/page/more", "me/my page", "me/a--b", "-me/page", "me/" + "x" * 100])
def test_invalid_names(hub, monkeypatch, name):
    assert f"--repo-id {name}:" in run(monkeypatch, "--weights", TINY, f"--repo-id={name}")
    assert not hub.requests


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--create-pr", "--revision", "x", "--repo-id", "me/x"],
        ["--dry-run", "--output", "x"],
        ["--dtype", "int8", "--dry-run"],
        ["--base", "me/base", "--dry-run"],
        ["--adapter", "x", "--dry-run"],
    ],
)
def test_options_that_do_not_go_together(args, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(["upload", "--weights", "x", *args])
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err


def test_dry_run_shows_all_and_keeps_and_sends_nothing(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["upload_to_hub.py", "--weights", str(TINY), "--repo-id", "me/page", "--dry-run"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    upload_to_hub.main()
    said = capsys.readouterr().out
    assert "  model.safetensors\n" in said and "license: apache-2.0" in said and "## Limits" in said
    assert find_origin(str(TINY)).text in said
    assert not hub.requests and not list(tmp_path.iterdir())
