"""A stand-in of the Hugging Face Hub on this machine: the part of its HTTP interface that odcheap uses, in memory."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".onnx", ".pt2", ".safetensors")  # the Hub stores such files by their SHA-256


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        users: The name of the user of each token.
        repositories: The commits of each repository: from each commit's hash to the content of its files by name, the
            newest one last.
        private: The names of the private repositories.
        large: The content of large files by their SHA-256.
        received: The requests so far, as "METHOD path".
        failure: A status with which every request is answered; None for none.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.users: dict[str, str] = {"hf_mine": "me"}
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.tags: dict[tuple[str, str], str] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.received: list[str] = []
        self.failure: int | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repository: str, files: dict[str, bytes]) -> str:
        """Adds a commit with these files to a repository, and returns its hash."""
        commits = self.repositories.setdefault(repository, {})
        commit = hashlib.sha1(repr((repository, len(commits), sorted(files))).encode()).hexdigest()
        commits[commit] = files
        return commit

    def newest(self, repository: str) -> dict[str, bytes]:
        return list(self.repositories[repository].values())[-1]


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.received.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.user = self.server.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if self.user is None and "Authorization" in self.headers:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if self.server.failure is not None:
            return self.refuse(self.server.failure, "Failure", "the stand-in fails")
        for pattern, answer in ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(self, *match.groups())
        return self.refuse(404, "NotFound", f"the stand-in does not know {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = respond

    def log_message(self, format: str, *arguments: object) -> None:
        """Prints nothing."""

    def send(self, content: Any, status: int = 200, **headers: str) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def find(self, repository: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """Returns a commit and its files, if the user may read them; otherwise answers as the Hub does."""
        commits, owner = self.server.repositories.get(repository), repository.partition("/")[0]
        if commits is None or (repository in self.server.private and self.user != owner):
            status = 404 if self.user else 401  # a stranger does not learn what exists
            return self.refuse(status, "RepoNotFound", "Repository not found")
        commit = self.server.tags.get((repository, revision), list(commits)[-1] if revision == "main" else revision)
        if commit not in commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, commits[commit]

    def may_write(self, owner: str) -> bool:
        if self.user is None:
            self.refuse(401, "", "Invalid username or password.")
        elif self.user != owner:
            self.refuse(403, "", f"You don't have the rights to write under the namespace {owner}")
        return self.user == owner

    def create(self) -> None:
        given = json.loads(self.body)
        owner = given["organization"] or self.user
        name = f"{owner}/{given['name']}"
        if not self.may_write(owner):
            return
        if name in self.server.repositories:
            return self.send({"error": "You already created this model repo", "url": name}, 409)
        if given.get("visibility") == "private" or given.get("private"):
            self.server.private.add(name)
        self.server.add(name, {".gitattributes": b""})
        self.send({"url": f"{self.server.address}/{name}", "name": name})

    def validate(self) -> None:
        """Checks the metadata as the Hub does, as far as odcheap writes them."""
        block = json.loads(self.body)["content"].split("---\n")[1]
        metadata, errors = yaml.safe_load(block), []
        for entry in metadata.get("model-index", []):
            for result in entry["results"]:
                errors += [f"{key} is missing" for key in ("task", "dataset", "metrics") if key not in result]
                errors += [f"{key}.type is missing" for key in ("task", "dataset") if "type" not in result[key]]
        if "@" in str(metadata.get("license")):
            errors.append('"license" must be one of the known licenses')
        warnings = [] if "license" in metadata else ["empty or missing license"]
        answer = {"errors": errors, "warnings": warnings}
        answer = {key: [{"message": text} for text in texts] for key, texts in answer.items()}
        self.send(answer, 400 if errors else 200)

    def preupload(self, repository: str, revision: str) -> None:
        if self.find(repository) and self.may_write(repository.partition("/")[0]):
            names = [file["path"] for file in json.loads(self.body)["files"]]
            mode = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
            self.send({"files": [{"path": n, "uploadMode": mode[n], "shouldIgnore": False} for n in names]})

    def batch(self, repository: str) -> None:
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.server.address}/storage/{entry['oid']}", "header": {}}}
        self.send({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large[oid] = self.body
        self.send({})

    def commit(self, repository: str, revision: str) -> None:
        found = self.find(repository)
        if not found or not self.may_write(repository.partition("/")[0]):
            return
        files = dict(found[1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.server.add(repository, files)
        self.send({"commitUrl": f"{self.server.address}/{repository}/commit/{commit}", "commitOid": commit})

    def describe(self, repository: str) -> None:
        if found := self.find(repository):
            siblings = [{"rfilename": name} for name in found[1]]
            is_private = repository in self.server.private
            self.send({"id": repository, "sha": found[0], "private": is_private, "siblings": siblings})

    def tree(self, repository: str, revision: str) -> None:
        if found := self.find(repository, revision):
            entry = {"type": "file", "oid": "0" * 40}
            self.send([entry | {"path": name, "size": len(content)} for name, content in found[1].items()])

    def resolve(self, repository: str, revision: str, name: str) -> None:
        if not (found := self.find(repository, revision)):
            return
        commit, files = found
        if name not in files:
            self.send({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        etag = hashlib.sha256(files[name]).hexdigest()
        self.send(files[name], ETag=f'"{etag}"', X_Repo_Commit=commit)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    "POST /api/repos/create": Handler.create,
    "POST /api/validate-yaml": Handler.validate,
    rf"POST /api/models/{NAME}/preupload/(.+)": Handler.preupload,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": Handler.batch,
    r"PUT /storage/(\w+)": Handler.store,
    rf"POST /api/models/{NAME}/commit/(.+)": Handler.commit,
    rf"GET /api/models/{NAME}": Handler.describe,
    rf"GET /api/models/{NAME}/tree/(.+)": Handler.tree,
    rf"(?:HEAD|GET) /{NAME}/resolve/([^/]+)/(.+)": Handler.resolve,
}


@contextmanager
def run_hub():
    """A context manager that returns the running server."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
