"""A stand-in for the Hugging Face Hub on the loopback: the few routes that are used, and no others."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from huggingface_hub import constants

TOKENS = {
    "hf_writes": {"role": "write"},
    "hf_reads": {"role": "read"},
}
USER = {"name": "me", "type": "user", "orgs": [{"name": "acme", "type": "org"}]}


@dataclass
class Repository:
    """Files by revision; a revision's commit is made of what it holds."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    gated: bool = False
    private: bool = False

    def commit(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit; None if there is none."""
        for name, files in self.revisions.items():
            told = json.dumps({path: oid(content) for path, content in sorted(files.items())})
            sha = hashlib.sha1(f"{name}{told}".encode()).hexdigest()
            if revision in (name, sha):
                return sha
        return None

    def files(self, revision: str) -> dict[str, bytes]:
        """The files of a branch, a tag or a commit."""
        sha = self.commit(revision)
        return next(files for name, files in self.revisions.items() if self.commit(name) == sha)


def oid(content: bytes) -> str:
    """A file's id, as git has it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def folder_files(folder: Path, **others: str) -> dict[str, bytes]:
    """The files of a folder, and others by name, of which a ``_`` is a dot."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return found | {name.replace("_", "."): text.encode() for name, text in others.items()}


def cache_snapshot(repo: str, files: dict[str, bytes]) -> Path:
    """Put a repository into this process's cache of the hub, as huggingface_hub lays it out."""
    place = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    sha = hashlib.sha1(repo.encode()).hexdigest()
    snapshot = place / "snapshots" / sha
    snapshot.mkdir(parents=True)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(sha)
    return snapshot


class Hub:
    """The server: its repositories, the paths that were fetched, and the requests it refused."""

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.fetched: list[str] = []
        self.refused: list[str] = []
        self.fails_to_commit = False
        self.app = FastAPI()
        self._routes()
        config = uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    @contextmanager
    def running(self) -> Iterator["Hub"]:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        yield self
        self._server.should_exit = True
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def environment(self, home: Path, token: str | None = "hf_writes") -> dict[str, str]:
        """What makes a process ask this hub, with a cache of its own."""
        asked = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        asked |= {"TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return asked | ({"HF_TOKEN": token} if token else {})

    def weights_fetched(self) -> list[str]:
        return [path for path in self.fetched if path.endswith((".safetensors", ".bin"))]

    def _routes(self) -> None:
        app, api = self.app, "/api/models/{org}/{name}"

        def found(org: str, name: str, revision: str = "main") -> Repository | Response:
            repo = self.repos.get(f"{org}/{name}")
            if repo is None:
                return _error(404, "RepoNotFound", "Repository not found")
            if repo.commit(revision) is None:
                return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return repo

        @app.get(api)
        @app.get(api + "/revision/{revision:path}")
        def info(org: str, name: str, revision: str = "main") -> Any:
            repo = found(org, name, revision)
            if isinstance(repo, Response):
                return repo
            files = [{"rfilename": path} for path in repo.files(revision)]
            told = {"id": f"{org}/{name}", "sha": repo.commit(revision), "siblings": files}
            return told | {"private": repo.private, "gated": repo.gated, "tags": []}

        @app.get(api + "/tree/{revision:path}")
        def tree(org: str, name: str, revision: str) -> Any:
            repo = found(org, name, revision)
            if isinstance(repo, Response):
                return repo
            return [
                {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
                for path, content in repo.files(revision).items()
            ]

        @app.api_route("/{org}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
        def resolve(request: Request, org: str, name: str, revision: str, path: str) -> Any:
            repo = found(org, name, revision)
            if isinstance(repo, Response):
                return repo
            if repo.gated:
                return _error(403, "GatedRepo", "Access to this model is restricted")
            content = repo.files(revision).get(path)
            if content is None:
                return _error(404, "EntryNotFound", "Entry not found")
            if request.method == "GET":
                self.fetched.append(f"{org}/{name}/{path}")
            headers = {"X-Repo-Commit": str(repo.commit(revision)), "ETag": f'"{oid(content)}"'}
            if request.method == "HEAD":
                return Response(headers=headers | {"Content-Length": str(len(content))})
            return Response(content, headers=headers, media_type="application/octet-stream")

        @app.get("/api/whoami-v2")
        def whoami(request: Request) -> Any:
            token = TOKENS.get(request.headers.get("authorization", "").removeprefix("Bearer "))
            if token is None:
                return _error(401, "", "Invalid credentials in Authorization header")
            return USER | {"auth": {"type": "access_token", "accessToken": token}}

        @app.post("/api/repos/create")
        async def create(request: Request) -> Any:
            asked = await request.json()
            name = f"{asked['organization']}/{asked['name']}"
            url = {"url": f"{self.url}/{name}"}
            if name in self.repos:
                return JSONResponse({"error": "exists", **url}, 409)
            self.repos[name] = Repository(private=asked.get("visibility") == "private")
            return url

        @app.post("/api/validate-yaml")
        async def validate(request: Request) -> Any:
            return {"errors": [], "warnings": []}

        @app.post(api + "/preupload/{revision}")
        async def preupload(request: Request, org: str, name: str, revision: str) -> Any:
            asked = (await request.json())["files"]
            return {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in asked
                ]
            }

        @app.post(api + "/commit/{revision}")
        async def commit(request: Request, org: str, name: str, revision: str) -> Any:
            if self.fails_to_commit:
                return _error(413, "", "The storage of this account is full")
            repo = self.repos[f"{org}/{name}"]
            for line in (await request.body()).splitlines():
                told = json.loads(line)
                if told["key"] == "file":
                    content = base64.b64decode(told["value"]["content"])
                    repo.revisions[revision][told["value"]["path"]] = content
            url = f"{self.url}/{org}/{name}/commit/{repo.commit(revision)}"
            return {"commitUrl": url, "commitOid": repo.commit(revision), "success": True}

        @app.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "DELETE"])
        def unknown(request: Request, path: str) -> Any:
            self.refused.append(f"{request.method} /{path}")
            return _error(501, "", "the stand-in does not know this route")


def _error(status: int, code: str, message: str) -> Response:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return JSONResponse({"error": message}, status, headers)
