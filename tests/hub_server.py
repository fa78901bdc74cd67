"""A hub on loopback: as much of the Hugging Face Hub as `huggingface_hub` calls to read a repository or write one."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stub"


@dataclass
class Repo:
    """A repository: its commits, each with its files; ``state`` is what there is to forbid."""

    commits: list = field(default_factory=list)
    messages: list = field(default_factory=list)
    private: bool = False
    state: str = ""

    def commit(self, files, message):
        number = len(self.commits)
        sha = hashlib.sha1(f"{number}{sorted(files.items())}{message}".encode()).hexdigest()
        self.commits.append((sha, files))
        self.messages.append(message)
        return sha

    def at(self, revision):
        for sha, files in reversed(self.commits):
            if revision in ("main", sha):
                return sha, files
        return None

    @property
    def files(self):
        return self.commits[-1][1]


class Hub:
    """The repositories of a hub, the requests it got, and which of them it is to fail."""

    def __init__(self):
        self.repos, self.blobs, self.requests, self.failing = {}, {}, [], {}

    def add(self, name, folder, **told):
        """Make a repository of a folder's files."""
        repo = self.repos[name] = Repo(**told)
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n", **files}, "made")
        return repo


@contextmanager
def serving():
    """Yield a `Hub` and where it answers."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer("GET")

    def do_HEAD(self):
        self._answer("HEAD")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def _answer(self, method):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((method, path))
        for pattern, status in self.hub.failing.items():
            if re.search(pattern, f"{method} {path}"):
                return self._error(status)
        for kind, pattern, name in ROUTES:
            if kind == ("GET" if method == "HEAD" else method) and (found := re.fullmatch(pattern, path)):
                return getattr(self, name)(**found.groupdict())
        return self._error(404)

    def _repo(self, name):
        repo = self.hub.repos.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not known):
            self._error(404 if known else 401, "RepoNotFound")
            return None
        if repo.state == "gated":
            self._error(403, "GatedRepo")
            return None
        return repo

    def info(self, repo, revision="main"):
        if (found := self._repo(repo)) is None:
            return
        if (at := found.at(revision)) is None:
            if found.commits:
                return self._error(404, "RevisionNotFound")
            at = ("0" * 40, {})
        siblings = [{"rfilename": name} for name in at[1]]
        self._json({"id": repo, "sha": at[0], "private": found.private, "siblings": siblings, "tags": []})

    def tree(self, repo, revision):
        if (found := self._repo(repo)) is not None:
            _, files = found.at(revision)
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            )

    def resolve(self, repo, revision, name):
        if (found := self._repo(repo)) is None:
            return
        if (at := found.at(revision)) is None:
            return self._error(404, "RevisionNotFound")
        if name not in at[1]:
            return self._error(404, "EntryNotFound")
        data = at[1][name]
        etag = hashlib.sha256(data).hexdigest()
        self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": at[0]})

    def create(self):
        told = json.loads(self.body)
        name = f"{told['organization']}/{told['name']}" if told.get("organization") else told["name"]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401)
        self.hub.repos[name] = Repo(private=bool(told.get("private") or told.get("visibility") == "private"))
        self.hub.repos[name].commit({".gitattributes": b""}, "initial commit")
        self._json({"url": f"{self.hub.url}/{name}", "id": name})

    def yaml(self):
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        files = json.loads(self.body)["files"]
        mode = {True: "lfs", False: "regular"}
        self._json({"files": [
            {"path": each["path"], "uploadMode": mode[each["path"].endswith((".safetensors", ".onnx"))],
             "shouldIgnore": False} for each in files
        ]})  # fmt: skip

    def batch(self, repo):
        told = json.loads(self.body)
        self._send(200, json.dumps({"transfer": "basic", "objects": [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/blobs/{each['oid']}", "header": {}}}}
            for each in told["objects"]
        ]}).encode(), {"Content-Type": "application/vnd.git-lfs+json"})  # fmt: skip

    def blob(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self._send(200, b"")

    def commit(self, repo, revision):
        if (found := self._repo(repo)) is None:
            return
        files, message = dict(found.files), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, found.commits[-1][0]):
                    return self._error(412)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = found.commit(files, message)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def _json(self, told):
        self._send(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _error(self, status, code=None):
        headers = {"Content-Type": "application/json"} | ({"X-Error-Code": code} if code else {})
        self._send(status, b'{"error": "refused"}', headers)

    def _send(self, status, data, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("GET", rf"/api/models/{REPO}", "info"),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>.+)", "info"),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", "tree"),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "yaml"),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/blobs/(?P<oid>\w+)", "blob"),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)", "commit"),
]
