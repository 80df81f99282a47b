# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Publishing: the folder's checks, the card, and the real Hub client against a small Hub on the loopback interface."""

import base64
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import urllib.parse
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from lemore_hf import LeMoReConfig, LeMoReForSemanticSegmentation
from lemore_hf.data.recipes import load_recipe
from lemore_hf.hub import PublishingError, ensure_card, validate_folder, write_card
from lemore_hf.image_processing_lemore import LeMoReImageProcessor

REPOSITORY = Path(__file__).parents[1]
CODE = {
    "configuration_lemore.py",
    "modeling_lemore.py",
    "image_processing_lemore.py",
    "image_processing_pil_lemore.py",
}
RESULTS = {
    "mean_iou": 0.68125,
    "per_class_iou": {"sky": 0.9, "road": 0.4625, "car": None},
    "mean_accuracy": 0.75,
    "overall_accuracy": 0.875,
    "confusion_matrix": [[1, 0, 0], [0, 1, 0], [0, 0, 0]],
    "dataset": "CamVid",
    "split": "test",
    "num_images": 233,
    "recipe": "camvid",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model and its processor, as training leaves them, with a picture and a log."""
    folder = tmp_path_factory.mktemp("saved") / "final"
    torch.manual_seed(0)
    config = LeMoReConfig(
        image_size=64,
        stem_sizes=(8, 8),
        hidden_sizes=(8, 12, 16, 16),
        decoder_hidden_size=16,
        id2label={0: "sky", 1: "road", 2: "car"},
        label2id={"sky": 0, "road": 1, "car": 2},
    )
    LeMoReForSemanticSegmentation(config).save_pretrained(folder)
    LeMoReImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    Image.new("RGB", (8, 8)).save(folder / "confusion_matrix.png")
    (folder / "log.jsonl").write_text("{}\n")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "final"))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The folder


def test_validated_files_are_those_that_others_need(folder):
    write_card(folder, "someone/lemore-test")
    names = {path.as_posix() for path in validate_folder(folder)}
    loadable = {"model.safetensors", "config.json", "preprocessor_config.json", *CODE}
    assert names == {*loadable, "README.md", "confusion_matrix.png"}


def test_missing_pieces_are_listed_together(folder):
    for name in ("model.safetensors", "preprocessor_config.json", "configuration_lemore.py"):
        (folder / name).unlink()
    with pytest.raises(PublishingError, match=r"model\.safetensors, preprocessor_config\.json, configuration"):
        validate_folder(folder)
    with pytest.raises(PublishingError, match="is not a folder"):
        validate_folder(folder / "nowhere")


def test_code_that_is_imported_only_by_other_code_is_needed(folder):
    (folder / "image_processing_pil_lemore.py").unlink()
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor["auto_map"] = {"AutoImageProcessor": "image_processing_lemore.LeMoReImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(PublishingError, match=r"missing: image_processing_pil_lemore\.py"):
        validate_folder(folder)


def test_folder_that_needs_the_package_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PublishingError, match=r"auto_map in config\.json"):
        validate_folder(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "figures/scores.pkl"])
def test_pickled_files_are_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(PublishingError, match=f"pickled files .*{Path(name).name}"):
        validate_folder(folder)


def test_truncated_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(PublishingError, match="truncated or damaged"):
        validate_folder(folder)


def test_tampered_header_is_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"F16"', 1))
    with pytest.raises(PublishingError, match="truncated or damaged"):
        validate_folder(folder)


def test_weights_of_another_network_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("classifier", "head"): tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors")
    with pytest.raises(PublishingError, match="does not hold the weights of the network"):
        validate_folder(folder)


def test_weights_that_are_not_finite_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    next(tensor for tensor in weights.values() if tensor.is_floating_point()).view(-1)[0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(PublishingError, match="NaN or infinity"):
        validate_folder(folder)


@pytest.mark.parametrize("link", ["figures/gone.png", "../secret.png"])
def test_card_may_show_only_pictures_of_the_folder(folder, link):
    (folder.parent / "secret.png").write_bytes(b"x")
    (folder / "README.md").write_text(f"![picture]({link})")
    with pytest.raises(PublishingError, match="pictures that are not in the folder"):
        validate_folder(folder)


# The card


def test_card_says_what_the_results_say(folder):
    write_card(folder, "someone/lemore-test", RESULTS, load_recipe("camvid"))
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert card.data.pipeline_tag == "image-segmentation"
    assert card.data.library_name == "transformers"
    assert card.data.license == "other"
    assert card.data.datasets == ["camvid"]
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores == {"mean_iou": 0.6813, "mean_accuracy": 0.75, "overall_accuracy": 0.875}
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    model = LeMoReForSemanticSegmentation.from_pretrained(folder)
    assert f"{model.num_parameters():,}".replace(",", " ") in card.text
    for line in ("# lemore-test", "| mean IoU | 68.12 |", "| road | 46.25 |", "| car | – |", "233 images"):
        assert line in card.text.splitlines() or line in card.text
    assert "weights trained on it carry that limit" in card.text
    assert "![confusion matrix](confusion_matrix.png)" in card.text
    assert 'model="someone/lemore-test"' in card.text


def test_card_without_results_claims_nothing(folder):
    write_card(folder, "someone/lemore-test")
    card = ModelCard.load(folder / "README.md")
    assert "have not been evaluated" in card.text
    assert card.data.eval_results is None
    assert card.data.license == "unknown"
    write_card(folder, "someone/lemore-test", recipe=load_recipe("scenes"))
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"


def test_card_of_a_user_is_kept(folder):
    (folder / "README.md").write_text("mine")
    ensure_card(folder, "someone/lemore-test")
    assert (folder / "README.md").read_text() == "mine"
    with pytest.raises(PublishingError, match="has a card already"):
        ensure_card(folder, "someone/lemore-test", recipe=load_recipe("camvid"))
    ensure_card(folder, "someone/lemore-test", RESULTS)
    assert "68.12" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"mean_iou": 68.1}, r"numbers in 0…1: mean_iou=68\.1"),
        ({"loss": 1.0}, "no evaluation's JSON"),
        ({"mean_iou": 0.5, "per_class_iou": [0.1, 0.2]}, "not of this model"),
        ({"mean_iou": 0.5, "per_class_iou": {"sky": 0.1, "road": 0.2, "boat": 0.3}}, "not of this model.*boat"),
    ],
)
def test_results_that_cannot_be_reported_are_refused_and_the_old_card_stays(folder, results, message):
    (folder / "README.md").write_text("old")
    with pytest.raises(PublishingError, match=message):
        write_card(folder, "someone/lemore-test", results)
    assert (folder / "README.md").read_text() == "old"


# The Hub


class LoopbackHub(http.server.ThreadingHTTPServer):
    """Repositories in memory, behind the endpoints that the client uses to publish and to download."""

    daemon_threads = True
    token = "hf_right"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), LoopbackHandler)
        self.repositories, self.objects, self.cut_repositories, self.requests = {}, {}, (), []

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
            self.reply({"errors": [], "warnings": []})
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
            self.reply({"id": repo_id, "sha": self.server.revision(repo_id), "siblings": siblings, "tags": []})
        elif action == "tree" and len(parts) == 4:
            self.reply([self.entry(path, data) for path, data in files.items()])
        elif action == "preupload":
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


@pytest.fixture
def hub():
    server = LoopbackHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
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


DOWNLOAD = """
    import sys
    sys.modules["lemore_hf"] = None  # As where the package is not installed.
    import torch
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
    model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1], trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
    image = torch.arange(3 * 50 * 70, dtype=torch.uint8).reshape(3, 50, 70)
    with torch.no_grad():
        logits = model(**processor(image, return_tensors="pt")).logits
    torch.save(logits, sys.argv[2])
"""


def test_published_model_gives_the_same_logits_elsewhere(hub, folder, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(RESULTS))
    script = [str(REPOSITORY / "scripts" / "push_to_hub.py")]
    arguments = ["--model", folder, "--repo_id", "lemore-test", "--results", tmp_path / "metrics.json"]
    result = run_client(script, hub, tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    assert f"{hub.url}/someone/lemore-test" in result.stdout

    published = hub.repositories["someone/lemore-test"]
    assert set(published) == {".gitattributes", *map(str, validate_folder(folder))}
    assert all(published[name] == (folder / name).read_bytes() for name in published if name != ".gitattributes")
    assert published["README.md"].count(b"68.12") == 1

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = run_client(
        ["-c", textwrap.dedent(DOWNLOAD)], hub, elsewhere, "someone/lemore-test", elsewhere / "logits.pt", token=""
    )
    assert result.returncode == 0, result.stderr
    image = torch.arange(3 * 50 * 70, dtype=torch.uint8).reshape(3, 50, 70)
    with torch.no_grad():
        model = LeMoReForSemanticSegmentation.from_pretrained(folder)
        expected = model(**LeMoReImageProcessor.from_pretrained(folder)(image, return_tensors="pt")).logits
    torch.testing.assert_close(torch.load(elsewhere / "logits.pt"), expected, rtol=0, atol=0)


# Runs the script again and again in one process, and prints how each run ended.
PUBLISH_EACH = """
    import json, os, runpy, sys, time
    time.sleep = lambda seconds: None  # The client waits longer and longer between its attempts.
    script, folder, runs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    ends = []
    for token, repo_id, *options in runs:
        os.environ["HF_TOKEN"] = token
        sys.argv = [script, "--model", folder, "--repo_id", repo_id, *options]
        try:
            runpy.run_path(script, run_name="__main__")
            ends.append(None)
        except SystemExit as error:
            ends.append(error.code)
    print(json.dumps(ends))
"""


def test_failures_are_explained_and_leave_everything_as_it_was(hub, folder, tmp_path):
    write_card(folder, "someone/lemore-test", RESULTS)
    before = contents(folder)
    other = {".gitattributes": b"", "config.json": b"{}", "notes.txt": b"important"}
    for name in ("taken", "replaced"):
        hub.commit(f"someone/{name}", dict(other))
    hub.commit("someone/cut", {".gitattributes": b""})
    hub.cut_repositories = ("someone/cut",)
    runs = [
        ("hf_wrong", "someone/new"),
        (hub.token, "someone/taken"),
        (hub.token, "someone/cut"),
        (hub.token, "someone/replaced", "--overwrite"),
        (hub.token, "replaced"),  # The same content again.
    ]
    script = REPOSITORY / "scripts" / "push_to_hub.py"
    result = run_client(["-c", textwrap.dedent(PUBLISH_EACH)], hub, tmp_path, script, folder, json.dumps(runs))
    assert result.returncode == 0, result.stderr
    wrong_token, taken, cut, replaced, again = json.loads(result.stdout.splitlines()[-1])

    # `sys.exit` with a text prints it and ends with status 1.
    assert wrong_token.startswith("error: cannot sign in")
    assert "HF_TOKEN" in wrong_token
    assert "someone/new" not in hub.repositories
    assert "already holds other content (config.json, notes.txt)" in taken
    assert "--overwrite" in taken
    assert hub.repositories["someone/taken"] == other
    assert cut.startswith("error: cannot upload to someone/cut")
    assert "run the command again" in cut
    assert set(hub.repositories["someone/cut"]) == {".gitattributes"}

    assert replaced is None
    assert set(hub.repositories["someone/replaced"]) == {".gitattributes", *map(str, validate_folder(folder))}
    assert again is None
    assert sum(path == "/api/models/someone/replaced/commit/main" for _, path in hub.requests) == 1
    assert contents(folder) == before
