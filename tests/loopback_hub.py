# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""A small Hub on the loopback interface, for the real client to publish to and to download from."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse

import yaml


class LoopbackHub(http.server.ThreadingHTTPServer):
    """Repositories in memory, behind the endpoints that the client uses to publish and to download."""

    daemon_threads = True
    token = "hf_right"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), LoopbackHandler)
        self.repositories, self.objects, self.cut_repositories, self.requests = {}, {}, (), []
        self.contested_repositories = ()
        self.private_repositories = set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo_id, files):
        self.repositories[repo_id] = files
        return self.revision(repo_id)

    def revision(self, repo_id):
        files = self.repositories[repo_id]
        return hashlib.sha1(repr(sorted((path, git_hash(data)) for path, data in files.items())).encode()).hexdigest()


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def metadata_errors(card):
    """What the Hub says of a licence outside of its list: "LICENSE", "LICENSE.md" or an address has its text."""
    metadata = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
    link = metadata.get("license_link", "LICENSE")
    return [] if link in ("LICENSE", "LICENSE.md") or "://" in link else [f'"license_link" must not be {link!r}']


class LoopbackHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, content=b"", status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status, message, code=None):
        self.reply({"error": message}, status, **({"X_Error_Code": code} if code else {}), X_Error_Message=message)

    def handle_request(self):
        hub, length = self.server, int(self.headers.get("Content-Length") or 0)
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        if self.command == "PUT" and path.startswith(tuple(f"/lfs/{repo_id}/" for repo_id in hub.cut_repositories)):
            self.rfile.read(length // 2)  # The connection breaks in the middle of the file.
            self.connection.close()
            self.close_connection = True
            return
        body = self.rfile.read(length)
        writes = self.command == "POST" or path == "/api/whoami-v2"
        if writes and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.fail(401, "Invalid credentials in Authorization header")
        elif path == "/api/whoami-v2":
            self.reply({"type": "user", "name": "someone", "orgs": [], "auth": {"type": "access_token"}})
        elif path == "/api/validate-yaml":
            errors = metadata_errors(json.loads(body)["content"])
            self.reply({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/lfs/verify":
            self.reply({}, 200 if json.loads(body)["oid"] in hub.objects else 404)
        elif path.startswith("/lfs/"):
            hub.objects[hashlib.sha256(body).hexdigest()] = body
            self.reply()
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.reply({"transfer": "basic", "objects": self.upload_actions(path, body)})
        elif path.startswith("/api/models/"):
            self.model(path.removeprefix("/api/models/").split("/"), body)
        else:
            self.resolve(path)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815  The base class names them.

    def create(self, request):
        repo_id = f"{request.get('organization') or 'someone'}/{request['name']}"
        if repo_id in self.server.repositories:
            self.reply({"error": "You already created this model repo", "url": f"{self.server.url}/{repo_id}"}, 409)
        else:
            self.server.commit(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
            if request.get("private") or request.get("visibility") == "private":
                self.server.private_repositories.add(repo_id)
            self.reply({"url": f"{self.server.url}/{repo_id}"})

    def upload_actions(self, path, body):
        repo_id = path.strip("/").removesuffix(".git/info/lfs/objects/batch")
        verify = {"href": f"{self.server.url}/lfs/verify"}
        return [
            {**x, "actions": {"upload": {"href": f"{self.server.url}/lfs/{repo_id}/{x['oid']}"}, "verify": verify}}
            for x in json.loads(body)["objects"]
        ]

    def model(self, parts, body):
        repo_id, action = "/".join(parts[:2]), parts[2] if len(parts) > 2 else "info"
        if repo_id not in self.server.repositories:
            self.fail(404, "Repository not found", "RepoNotFound")
            return
        files = self.server.repositories[repo_id]
        if action in ("info", "revision"):
            siblings = [{"rfilename": path} for path in files]
            private = repo_id in self.server.private_repositories
            described = {"id": repo_id, "sha": self.server.revision(repo_id), "private": private, "tags": []}
            self.reply(described | {"siblings": siblings})
        elif action == "tree" and len(parts) == 4:
            self.reply([self.entry(path, data) for path, data in files.items()])
        elif action == "preupload":
            if repo_id in self.server.contested_repositories:  # Somebody else commits first.
                self.server.commit(repo_id, files | {"notes.txt": b"theirs"})
            described = [
                {"path": x["path"], "uploadMode": self.mode(x["path"]), "shouldIgnore": False}
                for x in json.loads(body)["files"]
            ]
            self.reply({"files": described})
        elif action == "commit":
            self.commit(repo_id, [json.loads(line) for line in body.splitlines()])
        else:
            self.fail(404, "Entry not found", "EntryNotFound")

    @staticmethod
    def mode(path):
        return "lfs" if path.endswith((".safetensors", ".png")) else "regular"

    def entry(self, path, data):
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
        if self.mode(path) == "lfs":
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def commit(self, repo_id, lines):
        files = dict(self.server.repositories[repo_id])
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, self.server.revision(repo_id)):
                self.fail(412, "A commit has happened since")
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.server.commit(repo_id, files)
        self.reply({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}"})

    def resolve(self, path):
        repo_id, _, rest = path.strip("/").partition("/resolve/")
        files = self.server.repositories.get(repo_id)
        name = rest.partition("/")[2]
        if files is None:
            self.fail(404, "Repository not found", "RepoNotFound")
        elif name not in files:
            self.fail(404, "Entry not found", "EntryNotFound")
        else:
            self.reply(files[name], ETag=f'"{git_hash(files[name])}"', X_Repo_Commit=self.server.revision(repo_id))


@contextlib.contextmanager
def running_hub():
    """A hub that answers until the block ends."""
    server = LoopbackHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_client(code, hub, home, *args, token=LoopbackHub.token):
    """Run a program in a fresh process whose Hub is the loopback one (the client reads its address when imported)."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, *code, *map(str, args)], env=env, cwd=home, capture_output=True, text=True, timeout=300
    )
