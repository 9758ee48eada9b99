"""A Hub on this machine: the part of the Hub's HTTP API that `huggingface_hub` uses to publish a model and to load it.

Repositories with branches, tags, pull requests and commits; preupload, LFS batch (in one piece and in parts), verify,
commit; file info, trees, downloads with ranges; users by token, private repositories. Xet is not spoken: clients set
`HF_HUB_DISABLE_XET=1`. Files go by their git ids, large ones by their sha256 and from another origin (`localhost`, not
`127.0.0.1`), which takes signed links only and no token, as the real storage does. Faults are made on demand.

    with serve_hub({"hf_token": "me"}) as hub:
        os.environ["HF_ENDPOINT"] = hub.url
"""

import base64
import fnmatch
import hashlib
import http.server
import json
import re
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import yaml


GITATTRIBUTES = "".join(
    f"*.{end} filter=lfs diff=lfs merge=lfs -text\n" for end in ("bin", "gguf", "pt", "safetensors")
)
LARGE = 10 * 1024**2  # bytes from which on a file is LFS whatever it is called
PAGE = 1000  # entries of a tree in one answer


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class File:
    """An entry of a commit: the git id of its content, or of the LFS pointer to it."""

    oid: str
    size: int
    sha256: str | None = None
    pointer_size: int | None = None

    @classmethod
    def large(cls, sha256: str, size: int) -> "File":
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(git_id(pointer), size, sha256, len(pointer))


@dataclass(frozen=True)
class Commit:
    parent: str | None
    files: dict[str, File]
    message: str
    author: str

    @property
    def oid(self) -> str:
        return hashlib.sha1(repr(self).encode()).hexdigest()


@dataclass
class Repository:
    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/..., refs/pr/1: commit ids
    contents: dict[str, bytes] = field(default_factory=dict)  # by git id
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256

    def commit(self, ref: str, files: dict[str, File], message: str, author: str) -> str:
        commit = Commit(self.refs.get(ref), files, message, author)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit.oid

    def store(self, content: bytes) -> File:
        file = File(git_id(content), len(content))
        self.contents[file.oid] = content
        return file

    def content(self, file: File) -> bytes:
        return self.large[file.sha256] if file.sha256 else self.contents[file.oid]

    def ref(self, revision: str) -> str | None:
        return next((r for r in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}") if r in self.refs), None)

    def head(self, revision: str) -> str:
        oid = self.refs.get(self.ref(revision), revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def is_large(self, path: str, size: int, sample: bytes, revision: str) -> bool:
        attributes = self.commits[self.head(revision)].files.get(".gitattributes")
        lines = self.content(attributes).decode().splitlines() if attributes else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        return (
            size > LARGE or b"\0" in sample or any(fnmatch.fnmatch(Path(path).name, pattern) for pattern in patterns)
        )


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of this method whose path matches; nothing, where only these are
    given.

    Args:
        status: The answer, instead of the real one.
        cut_request: The connection ends after so many bytes of the request's body were read; nothing is done.
        cut_response: The request is done; the connection ends after so many bytes of the answer's body.
    """

    method: str
    path: str
    status: int | None = None
    cut_request: int | None = None
    cut_response: int | None = None
    times: int = 1


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    status: int | None = None  # of the answer; None where the connection was cut

    def json(self):
        return json.loads(self.body)

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, data, status: int = 200, **headers: str) -> "Answer":
        return cls(status, json.dumps(data).encode(), {"Content-Type": "application/json", **headers})


class Refusal(Exception):
    """An error of the API: status, message, and the code by which clients tell what is missing."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        headers["X-Error-Message"] = message
        if code:
            headers["X-Error-Code"] = code
        self.answer = Answer.json({"error": message}, status, **headers)


_ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(method: str, path: str):
    """The method answers these requests. `{repo}` stands for owner/name, other names for one part of the path, quoted
    or not, and `{path}` for the rest of it."""
    pattern = path.replace(".", r"\.").replace("{repo}", "(?P<repo>[^/]+/[^/]+)").replace("{path}", "(?P<path>.*)")
    pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern))

    def register(function):
        _ROUTES.append((method, pattern, function))
        return function

    return register


class Hub:
    """The state of the server, and its answers. `users` are names by token; a user may write what is named after
    them."""

    def __init__(self, users: dict[str, str], part_size: int | None = None):
        self.users = users
        self.part_size = part_size  # of LFS uploads in parts; None: always in one piece
        self.url = self.storage_url = ""
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.links: dict[str, tuple] = {}  # signed: (repository, sha256) to get or put, (upload, number) to put
        self.uploads: dict[str, tuple] = {}  # in parts: (repository, sha256, size, {number: content})
        self.lock = threading.RLock()

    # What tests use --------------------------------------------------------------------------------------------------

    def create(self, name: str, private: bool = False) -> Repository:
        repository = self.repositories[name] = Repository(name, private)
        repository.commit(
            "refs/heads/main", {".gitattributes": repository.store(GITATTRIBUTES.encode())}, "initial commit", name
        )
        return repository

    def put(self, name: str, folder: Path, revision: str = "main") -> str:
        """A commit that adds all files of a folder; returns its id."""
        repository = self.repositories.get(name) or self.create(name)
        start = repository.ref(revision) or "refs/heads/main"
        files = dict(repository.commits[repository.refs[start]].files)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content, relative = path.read_bytes(), path.relative_to(folder).as_posix()
            if repository.is_large(relative, len(content), content[:512], start):
                files[relative] = File.large(hashlib.sha256(content).hexdigest(), len(content))
                repository.large[files[relative].sha256] = content
            else:
                files[relative] = repository.store(content)
        repository.refs.setdefault(f"refs/heads/{revision}", repository.refs[start])
        return repository.commit(f"refs/heads/{revision}", files, f"put {Path(folder).name}", name)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        files = repository.commits[repository.head(revision)].files
        return {path: repository.content(file) for path, file in files.items()}

    def next_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            found = (
                fault
                for fault in self.faults
                if fault.times and fault.method == method and re.search(fault.path, path)
            )
            fault = next(found, Fault(method, path))
            fault.times -= 1
            return fault

    # Who asks for what -----------------------------------------------------------------------------------------------

    def answer(self, request: Request) -> Answer:
        for method, pattern, function in _ROUTES:
            if method == ("GET" if request.method == "HEAD" else request.method) and (
                match := pattern.fullmatch(request.path)
            ):
                try:
                    with self.lock:
                        return function(
                            self, request, **{name: unquote(part) for name, part in match.groupdict().items()}
                        )
                except Refusal as refusal:
                    return refusal.answer
        return Answer.json({"error": "Not Found"}, 404)

    def user(self, request: Request) -> str | None:
        if request.token is None:
            return None
        if request.token not in self.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.users[request.token]

    def known_user(self, request: Request) -> str:
        if (user := self.user(request)) is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def readable(self, request: Request, name: str) -> Repository:
        user, repository = self.user(request), self.repositories.get(name)
        if repository is None or (repository.private and user != name.split("/")[0]):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, request: Request, name: str) -> Repository:
        user, repository = self.known_user(request), self.readable(request, name)
        if user != name.split("/")[0]:
            raise Refusal(403, f"You don't have the rights to write to {name}")
        return repository

    # Users and repositories ------------------------------------------------------------------------------------------

    @route("GET", "/api/whoami-v2")
    def whoami(self, request):
        return Answer.json(
            {"type": "user", "name": self.known_user(request), "orgs": [], "auth": {"type": "access_token"}}
        )

    @route("POST", "/api/repos/create")
    def create_repo(self, request):
        user, asked = self.known_user(request), request.json()
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if owner != user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
        if not re.fullmatch(r"[\w.-]{1,96}", asked["name"]) or "--" in name or ".." in name:
            raise Refusal(400, f"Invalid repository name: {asked['name']}")
        if name in self.repositories:
            return Answer.json({"error": "You already created this model repo", "url": f"{self.url}/{name}"}, 409)
        self.create(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return Answer.json({"name": name, "url": f"{self.url}/{name}", "id": name})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request):
        content = request.json()["content"]
        block = re.match(r"\s*---\r?\n([\S\s]*?)\r?\n---[ \t]*(\r?\n|$)", content)
        if not block:
            return Answer.json(
                {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
            )
        try:
            data = yaml.safe_load(block[1])
            errors = _metadata_errors(data) if isinstance(data, dict) else ["metadata is not a mapping"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        return Answer.json({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)

    @route("GET", "/api/models/{repo}")
    def model_info(self, request, repo, revision="main"):
        repository = self.readable(request, repo)
        oid = repository.head(revision)
        siblings = [{"rfilename": path} for path in repository.commits[oid].files]
        if "blobs" in request.query:
            siblings = [
                {"rfilename": path, "blobId": file.oid, "size": file.size}
                | (
                    {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}}
                    if file.sha256
                    else {}
                )
                for path, file in repository.commits[oid].files.items()
            ]
        return Answer.json({
            "_id": repo, "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": oid,
            "private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "siblings": siblings, "createdAt": "2026-01-01T00:00:00.000Z", "lastModified": "2026-01-01T00:00:00.000Z",
        })  # fmt: skip

    @route("GET", "/api/models/{repo}/revision/{revision}")
    def revision_info(self, request, repo, revision):
        return self.model_info(request, repo, revision)

    @route("GET", "/api/models/{repo}/refs")
    def list_refs(self, request, repo):
        repository = self.readable(request, repo)

        def starting_with(prefix: str) -> list[dict]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in repository.refs.items()
                if ref.startswith(prefix)
            ]

        refs = {"branches": starting_with("refs/heads/"), "tags": starting_with("refs/tags/"), "converts": []}
        return Answer.json(
            refs | ({"pullRequests": starting_with("refs/pr/")} if request.query.get("include_prs") else {})
        )

    @route("POST", "/api/models/{repo}/branch/{branch}")
    def create_branch(self, request, repo, branch):
        repository = self.writable(request, repo)
        if branch.startswith("refs/"):
            raise Refusal(400, f"Invalid branch name: {branch}")
        if f"refs/heads/{branch}" in repository.refs:
            raise Refusal(409, "Reference already exists")
        repository.refs[f"refs/heads/{branch}"] = repository.head((request.json() or {}).get("startingPoint", "main"))
        return Answer.json({})

    # Upload ----------------------------------------------------------------------------------------------------------

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def preupload(self, request, repo, revision):
        as_pr = request.query.get("create_pr") == "1"
        repository = (
            self.readable(request, repo) if as_pr and self.known_user(request) else self.writable(request, repo)
        )
        files = repository.commits[repository.head(revision)].files
        hosted = repository.content(files[".gitignore"]).decode() if ".gitignore" in files else ""
        ignored = [
            line for line in request.json().get("gitIgnore", hosted).splitlines() if line and not line.startswith("#")
        ]

        def mode(asked: dict) -> dict:
            path, there = asked["path"], files.get(asked["path"])
            large = repository.is_large(path, asked["size"], base64.b64decode(asked["sample"]), revision)
            return {
                "path": path,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
                "oid": there and (there.sha256 or there.oid),
            }

        return Answer.json({"files": [mode(asked) for asked in request.json()["files"]]})

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def lfs_batch(self, request, repo):
        asked = request.json()
        repository = self.writable(request, repo) if "ref" in asked else self.readable(request, repo)
        self.known_user(request)
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256":
            raise Refusal(422, f"Unsupported: {asked['operation']} by {asked['hash_algo']}")

        def actions(oid: str, size: int) -> dict:
            if oid in repository.large:
                return {}
            if self.part_size and size > self.part_size and "multipart" in asked["transfers"]:
                upload = secrets.token_hex(8)
                self.uploads[upload] = (repository, oid, size, {})
                parts = range(1, ceil(size / self.part_size) + 1)
                header = {"chunk_size": str(self.part_size)} | {str(n): self.sign(upload, n) for n in parts}
                target = {"href": f"{self.url}/api/complete_multipart?uploadId={upload}", "header": header}
            else:
                target = {"href": self.sign(repository, oid)}
            verify = {"href": f"{self.url}/{repo}.git/info/lfs/objects/verify"}
            return {"actions": {"upload": target, "verify": verify}}

        objects = [{"oid": o["oid"], "size": o["size"]} | actions(o["oid"], o["size"]) for o in asked["objects"]]
        return Answer.json({"transfer": "basic", "objects": objects})

    @route("POST", "/api/complete_multipart")
    def complete_multipart(self, request):
        repository, oid, size, parts = self.uploads[request.query["uploadId"]]
        given = [(part["partNumber"], part["etag"].strip('"')) for part in request.json()["parts"]]
        if (
            given != [(number, hashlib.md5(parts[number]).hexdigest()) for number in sorted(parts)]
            or request.json()["oid"] != oid
        ):
            raise Refusal(400, "The parts given are not those that arrived")
        self.keep(repository, oid, b"".join(parts[number] for number in sorted(parts)))
        return Answer.json({"success": True})

    @route("POST", "/{repo}.git/info/lfs/objects/verify")
    def lfs_verify(self, request, repo):
        self.known_user(request)
        content = self.readable(request, repo).large.get(request.json()["oid"])
        if content is None or len(content) != request.json()["size"]:
            raise Refusal(404, "The object is not there, or has another size")
        return Answer.json({"success": True})

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def commit(self, request, repo, revision):
        as_pr = request.query.get("create_pr") == "1"
        repository = (
            self.readable(request, repo) if as_pr and self.known_user(request) else self.writable(request, repo)
        )
        head = repository.head(revision)
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        message, parent = header["value"]["summary"], header["value"].get("parentCommit")
        if not message:
            raise Refusal(400, "The commit has no summary")
        if parent is not None and parent != head and not as_pr:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[parent if as_pr and parent else head].files)
        for operation in operations:
            value = operation["value"]
            path = value["path"]
            if operation["key"] == "file":
                files[path] = repository.store(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if len(repository.large.get(value["oid"], b"")) != value["size"]:
                    raise Refusal(400, f"The LFS object of {path} was not uploaded")
                files[path] = File.large(value["oid"], value["size"])
            elif operation["key"] == "deletedFile" and path in files:
                del files[path]
            else:
                raise Refusal(404, f"{operation['key']} {path}: A file with this name doesn't exist", "EntryNotFound")
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        ref = f"refs/pr/{number}" if as_pr else repository.ref(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise Refusal(400, f"{revision} is no branch")
        if as_pr:
            repository.refs[ref] = parent or head
        oid = repository.commit(ref, files, message, self.user(request))
        url = f"{self.url}/{repo}"
        return Answer.json({
            "success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}",
            "pullRequestUrl": f"{url}/discussions/{number}" if as_pr else None,
        })  # fmt: skip

    # Files -----------------------------------------------------------------------------------------------------------

    def entries(self, repository: Repository, oid: str) -> list[dict]:
        return [
            {"type": "file", "path": path, "oid": file.oid, "size": file.size}
            | (
                {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}}
                if file.sha256
                else {}
            )
            for path, file in sorted(repository.commits[oid].files.items())
        ]

    @route("GET", "/api/models/{repo}/tree/{revision}")
    def tree(self, request, repo, revision, path=""):
        repository = self.readable(request, repo)
        files = self.entries(repository, repository.head(revision))
        inside = [entry for entry in files if entry["path"].startswith(f"{path}/" if path else "")]
        if path and not inside:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        folders = {str(p) for e in inside for p in list(Path(e["path"]).parents)[:-1] if len(str(p)) > len(path)}
        inside += [
            {"type": "directory", "path": p, "oid": hashlib.sha1(p.encode()).hexdigest(), "size": 0}
            for p in sorted(folders)
        ]
        if request.query.get("recursive", "false").lower() != "true":
            inside = [entry for entry in inside if str(Path(entry["path"]).parent) == (path or ".")]
        start = int(request.query.get("cursor", 0))
        more = {**request.query, "cursor": str(start + PAGE)}
        link = (
            {"Link": f'<{self.url}{request.path}?{urlencode(more)}>; rel="next"'} if start + PAGE < len(inside) else {}
        )
        return Answer.json(inside[start : start + PAGE], **link)

    @route("GET", "/api/models/{repo}/tree/{revision}/{path}")
    def subtree(self, request, repo, revision, path):
        return self.tree(request, repo, revision, path)

    @route("POST", "/api/models/{repo}/paths-info/{revision}")
    def paths_info(self, request, repo, revision):
        repository = self.readable(request, repo)
        paths = parse_qs(request.body.decode())["paths"]
        return Answer.json([e for e in self.entries(repository, repository.head(revision)) if e["path"] in paths])

    @route("GET", "/{repo}/resolve/{revision}/{path}")
    def resolve(self, request, repo, revision, path):
        repository = self.readable(request, repo)
        oid = repository.head(revision)
        if (file := repository.commits[oid].files.get(path)) is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.sha256 is None:
            return _part(request, repository.content(file), headers)
        link = self.sign(repository, file.sha256) + f"&filename={quote(path)}"
        return Answer(
            302,
            b"",
            headers | {"Location": link, "X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)},
        )

    # Storage: another origin, signed links, no tokens ----------------------------------------------------------------

    def sign(self, *what) -> str:
        signature = secrets.token_hex(16)
        self.links[signature] = what
        return f"{self.storage_url}/storage?signature={signature}"

    def signed(self, request) -> tuple:
        if request.token is not None or request.headers["host"] != urlsplit(self.storage_url).netloc:
            raise Refusal(400, "Only one auth mechanism allowed; the signature is in the link")
        if request.query.get("signature") not in self.links:
            raise Refusal(403, "SignatureDoesNotMatch")
        return self.links[request.query["signature"]]

    def keep(self, repository: Repository, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The content does not have the sha256 that was announced")
        repository.large[oid] = content

    @route("PUT", "/storage")
    def put_object(self, request):
        where, what = self.signed(request)
        if isinstance(where, Repository):
            self.keep(where, what, request.body)
        else:
            self.uploads[where][3][what] = request.body
        return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    @route("GET", "/storage")
    def get_object(self, request):
        repository, oid = self.signed(request)
        return _part(request, repository.large[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def _part(request: Request, content: bytes, headers: dict[str, str]) -> Answer:
    """The content, or the range of it that was asked for."""
    if (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))) is None:
        return Answer(200, content, headers)
    start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if start > end:
        raise Refusal(416, "Requested range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
    return Answer(206, content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"})


def _metadata_errors(data: dict) -> list[str]:
    """What the Hub says of a card's metadata."""
    errors = []
    for key in ("license", "library_name", "pipeline_tag"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    for key in ("tags", "language", "base_model", "datasets", "metrics"):
        values = data.get(key, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            errors.append(f'"{key}" must be a string or a list of strings')
    if isinstance(data.get("license"), str) and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", data["license"]):
        errors.append('"license" must be one of the identifiers of the Hub')
    for index, entry in enumerate(data.get("model-index") or []):
        if not entry.get("name"):
            errors.append(f'"model-index[{index}].name" is required')
        for number, result in enumerate(entry.get("results", [])):
            where = f"model-index[{index}].results[{number}]"
            errors += [
                f'"{where}.{key}.type" is required'
                for key in ("task", "dataset")
                if not result.get(key, {}).get("type")
            ]
            errors += [
                f'"{where}.metrics" lacks type or value'
                for m in result.get("metrics", [])
                if not {"type", "value"} <= set(m)
            ]
    return errors


@contextmanager
def serve_hub(users: dict[str, str], **settings):
    """The server, started, as its [`Hub`]."""
    hub = Hub(users, **settings)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self):
            url = urlsplit(self.path)
            query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
            headers = {key.lower(): value for key, value in self.headers.items()}
            fault = hub.next_fault(self.command, url.path)
            request = Request(self.command, url.path, query, headers, self.read_body(fault.cut_request))
            hub.requests.append(request)
            if fault.cut_request is not None:
                return self.cut()
            answer = Answer.json({"error": "Made on demand"}, fault.status) if fault.status else hub.answer(request)
            request.status = answer.status
            self.send_response(answer.status)
            for key, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(key, value)
            if fault.cut_response != 0:
                self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[: fault.cut_response])
            if fault.cut_response is not None:
                self.cut()

        do_GET = do_HEAD = do_POST = do_PUT = handle_request

        def read_body(self, limit: int | None) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                length = int(self.headers.get("Content-Length", 0))
                return self.rfile.read(length if limit is None else min(limit, length))
            body = b""
            while (size := int(self.rfile.readline(), 16)) and (limit is None or len(body) < limit):
                body += self.rfile.read(size)
                self.rfile.readline()
            if size == 0:
                self.rfile.readline()
            return body

        def cut(self):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url, hub.storage_url = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
