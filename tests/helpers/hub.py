"""A small Hub on loopback: what the client of `huggingface_hub` asks for to create, change and read a repository.

Stands in for the real one in tests: it keeps repositories in memory, checks the token and the card's metadata, and a
commit changes all of its files or none. It has no xet storage, so the client must run with HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_loopback"
USER = "me"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        self.files = files
        content = json.dumps([len(self.commits), {name: git_hash(data) for name, data in files.items()}])
        self.commits.append(hashlib.sha1(content.encode()).hexdigest())
        return self.commits[-1]


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class LoopbackHub:
    """`with LoopbackHub() as hub:` serves at `hub.url`; `hub.repositories` is what it holds.

    Attributes:
        requests: (method, path) of every request.
        cut: Close the connection in the middle of the answer to a commit, before or after it took effect.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut: str | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repository:
        self.repositories[name] = Repository(private)
        self.repositories[name].commit(files)
        return self.repositories[name]

    def writes(self) -> list[str]:
        """Paths of requests that change something."""
        return [path for method, path in self.requests if method in ("POST", "PUT") and "validate-yaml" not in path]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        for methods, pattern, action in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                return action(self, **match.groupdict())
        self._fail(404, "no such route")

    def _answer(self, data: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _fail(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._answer({"error": message}, status, headers)

    def _authorized(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._fail(401, "Invalid credentials in Authorization header")
        return False

    def _repository(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        hidden = repository and repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if repository is None or hidden:
            self._fail(404, "Repository not found", "RepoNotFound")
            return None
        return repository

    def whoami(self) -> None:
        if self._authorized():
            self._answer({"type": "user", "name": USER, "orgs": []})

    def create(self) -> None:
        if not self._authorized():
            return
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or USER
        name = f"{owner}/{wanted['name']}"
        if owner != USER:
            return self._fail(403, f"You have no rights under the namespace {owner}")
        if name in self.hub.repositories:
            return self._fail(409, "You already created this model repo")
        self.hub.add(name, {".gitattributes": b""}, private=wanted.get("visibility") == "private")
        self._answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def validate(self) -> None:
        errors = card_errors(json.loads(self.body)["content"])
        self._answer({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)

    def info(self, repo: str, revision: str | None = None) -> None:
        repository = self._repository(repo)
        if repository:
            siblings = [{"rfilename": name} for name in repository.files]
            self._answer(
                {"id": repo, "sha": repository.commits[-1], "private": repository.private, "siblings": siblings}
            )

    def tree(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        if repository:
            self._answer(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
                    for name, data in repository.files.items()
                ]
            )

    def preupload(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        if not repository or not self._authorized():
            return
        modes = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith((".safetensors", ".png"))
            there = repository.files.get(file["path"])
            oid = None if there is None else hashlib.sha256(there).hexdigest() if large else git_hash(there)
            modes.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self._answer({"files": modes})

    def lfs_batch(self, repo: str) -> None:
        if self._authorized():
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/storage/{o['oid']}"}}}
                for o in json.loads(self.body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._fail(400, "content does not match its hash")
        self.hub.large_files[oid] = self.body
        self._answer(b"")

    def commit(self, repo: str, revision: str) -> None:
        repository = self._repository(repo)
        if not repository or not self._authorized():
            return
        files = dict(repository.files)
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit") not in (None, repository.commits[-1]):
                return self._fail(412, "A commit has happened since")
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        if self.hub.cut != "before":
            repository.commit(files)
        if self.hub.cut:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"commitUrl":')
            self.close_connection = True
            return
        oid = repository.commits[-1]
        self._answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        repository = self._repository(repo)
        if not repository:
            return
        head = {"X-Repo-Commit": repository.commits[-1]}
        if name not in repository.files:
            return self._answer(b"", 404, {"X-Error-Code": "EntryNotFound", **head})
        data = repository.files[name]
        self._answer(data, 200, {"ETag": f'"{git_hash(data)}"', **head})

    ROUTES = (
        ("GET", r"/api/whoami-v2", whoami),
        ("POST", r"/api/repos/create", create),
        ("POST", r"/api/validate-yaml", validate),
        ("GET", rf"/api/models/{REPO}", info),
        ("GET", rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", info),
        ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", tree),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", preupload),
        ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", commit),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
        ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", store),
        (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", resolve),
    )


def card_errors(content: str) -> list[str]:
    """What the Hub's check of a card's metadata would refuse, as far as its documentation says."""
    block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if block is None:
        return ["there is no metadata block"]
    try:
        data = yaml.safe_load(block.group(1))
    except yaml.YAMLError as error:
        return [f"metadata is no YAML: {error}"]
    errors = []
    for name in ("library_name", "pipeline_tag", "license", "base_model_relation"):
        if not isinstance(data.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    if not HUB_ID.fullmatch(str(data.get("base_model", "none"))):
        errors.append(f'"base_model" with value {data["base_model"]!r} is not valid. Use a model id from the Hub.')
    if data.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append('"base_model_relation" is unknown')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be strings')
    for entry in data.get("model-index", []):
        for result in entry["results"]:
            if not result["task"].get("type") or not {"type", "name"} <= set(result["dataset"]):
                errors.append('"model-index" results need a task type and a dataset type and name')
            if not all("type" in metric and "value" in metric for metric in result["metrics"]):
                errors.append('"model-index" metrics need a type and a value')
    return errors
