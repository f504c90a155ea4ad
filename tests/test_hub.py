"""Loading by hub id, from a hub of our own on this machine: what is asked for, and what is said when it says no."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import write_checkpoint
from test_loading import shard

import glmlens

TOKENS = torch.arange(2, 14)[None]
EXTRA = ["README.md", "modeling_glm.py", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors"]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs: a model's files, their tree, and their bytes in ranges."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path, self.headers.get("Authorization"), self.headers.get("Range")))
        api, parts = path.startswith("/api/models/"), path.removeprefix("/api/models").split("/")[1:]
        name, kind, rest = "/".join(parts[:2]), parts[2:3], parts[3:]
        if name in self.server.refuses:
            return self.refuse(*self.server.refuses[name])
        if name not in self.server.repos:
            return self.refuse(404, "RepoNotFound")
        versions = self.server.repos[name]
        sha = sha_of(name, rest[0] if kind else "main")
        files = next((f for v, f in versions.items() if rest[:1] in ([v], [sha_of(name, v)])), None)
        files = versions["main"] if not kind else files
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        if api and kind == ["tree"]:
            tree = [{"type": "file", "path": f, "size": len(x), "oid": etag(x)} for f, x in files.items()]
            return self.send(json.dumps(tree).encode())
        if api:
            told = {"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in files]}
            return self.send(json.dumps(told).encode())
        return self.file("/".join(rest[1:]), files, sha)

    def file(self, name, files, sha):
        if self.command == "GET" and name in self.server.broken:
            return self.refuse(403, "")
        data, start = files[name], int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and name in self.server.stalls:
            return self.stall(name, data, headers)
        cut = self.server.cut.pop(name, None) if self.command == "GET" else None
        return self.send(data[start:], 206 if start else 200, headers, cut)

    def stall(self, name, data, headers):
        """Say a half, and then nothing until the other side has gone."""
        half = len(data) // 2
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data[:half])
        self.wfile.flush()
        self.server.stalls.pop(name).set()
        self.connection.settimeout(120)
        self.connection.recv(1)
        self.close_connection = True

    def send(self, body, status=200, headers=None, cut=None):
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def refuse(self, status, code):
        self.send(b"{}", status, {"X-Error-Code": code, "X-Error-Message": "no"} if code else {})


def etag(data):
    return hashlib.sha1(data).hexdigest()


def sha_of(name, revision):
    return revision if len(revision) == 40 else hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.repos, server.refuses, server.asked, server.cut, server.broken, server.stalls = {}, {}, [], {}, set(), {}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


CLIENT = """
import glmlens, json, math, sys, torch
for name, revision in json.loads(sys.argv[1]):
    try:
        print(math.fsum(glmlens.load(name, revision=revision)(torch.arange(2, 14)[None]).flatten().tolist()))
    except glmlens.CheckpointError as e:
        print(str(e).replace(chr(10), " "))
"""


def client(hub, cache, *names, **env):
    """The command that loads these, each a name or a name and a revision, and its environment."""
    calls = [[name, None] if isinstance(name, str) else name for name in names]
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_CACHE": str(cache), **env}
    env["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # logits are the same to the bit by as many threads
    known = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return {"args": [sys.executable, "-c", CLIENT, json.dumps(calls)], "env": known | env}


def loads(hub, cache, *names, **env):
    """What loading these comes to: the sum of some logits, or what is wrong."""
    done = subprocess.run(**client(hub, cache, *names, **env), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    hub.shown = done.stderr
    return [float(line) if line.removeprefix("-")[:1].isdigit() else line for line in done.stdout.splitlines()]


def publish(hub, name, folder, revision="main"):
    """Put a folder on the hub, with what else repositories hold; the sum of its logits."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    hub.repos.setdefault(name, {})[revision] = files | dict.fromkeys(EXTRA, b"never asked for")
    return summed(folder)


def summed(folder):
    """The sum of some logits, exactly rounded: what torch sums to depends on the number of its threads."""
    return math.fsum(glmlens.load(folder)(TOKENS).flatten().tolist())


def got(hub):
    """How often each file's content was asked for."""
    return Counter(path.split("/")[-1] for method, path, *_ in hub.asked if method == "GET" and "/resolve/" in path)


def test_only_what_a_glm_is_read_from_is_downloaded_once_and_with_the_token(hub, tmp_path):
    folder, cache = tmp_path / "folder", tmp_path / "cache"
    write_checkpoint(folder, 2)
    expected = publish(hub, "some-org/glm", folder)
    assert loads(hub, cache, "some-org/glm", HF_TOKEN="hf_ours") == [expected]
    assert got(hub) == {"config.json": 1, "generation_config.json": 1, "model.safetensors": 1}
    assert {token for _, path, token, _ in hub.asked if "some-org" in path} == {"Bearer hf_ours"}
    assert "fetching some-org/glm: 100%" in hub.shown
    before = got(hub)
    assert loads(hub, cache, "some-org/glm") == [expected]
    assert got(hub) == before
    hub.asked.clear()
    assert loads(hub, cache, "some-org/glm", HF_HUB_OFFLINE="1") == [expected]
    assert hub.asked == []
    assert loads(hub, cache, "some-org/glm", HF_ENDPOINT="http://127.0.0.1:9") == [expected]  # nobody answers there
    (told,) = loads(hub, cache, "some-org/other", HF_HUB_OFFLINE="1")
    for part in ("some-org/other: neither a folder here nor", "not in its cache", "unset HF_HUB_OFFLINE"):
        assert part in told


def test_a_download_goes_on_where_it_stopped(hub, tmp_path):
    folder, cache = tmp_path / "folder", tmp_path / "cache"
    write_checkpoint(folder, 2, vocab_size=60_000, hidden_size=64, tie_word_embeddings=True)
    files = set(shard(folder).values())
    expected = publish(hub, "some-org/glm", folder)
    large = max(files, key=lambda file: (folder / file).stat().st_size)
    hub.broken.add(large)
    (told,) = loads(hub, cache, "some-org/glm")
    for part in ("some-org/glm: the download stopped", "403", "Load it again to go on"):
        assert part in told
    hub.broken.clear()
    hub.asked.clear()
    hub.cut[large] = 12_000_000  # the connection ends early
    assert loads(hub, cache, "some-org/glm") == [expected]
    assert set(got(hub)) == {file for file in files if file >= large}  # what had arrived is not asked for again
    ranges = [asked for method, _, _, asked in hub.asked if method == "GET" and asked]
    assert len(ranges) == 1
    assert 0 < int(ranges[0].removeprefix("bytes=").split("-")[0]) <= 12_000_000


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_download_that_was_ended_costs_the_file_under_way_and_no_other(hub, tmp_path, how):
    folder, cache = tmp_path / "folder", tmp_path / "cache"
    write_checkpoint(folder, 2)
    first, second, third = sorted(set(shard(folder).values()))
    expected = publish(hub, "some-org/glm", folder)
    hub.stalls[second] = stalled = threading.Event()
    with subprocess.Popen(**client(hub, cache, "some-org/glm"), stderr=subprocess.DEVNULL) as ended:
        assert stalled.wait(300)
        ended.send_signal(how)
        assert ended.wait(300) != 0
    assert got(hub)[first] == got(hub)[second] == 1
    assert third not in got(hub)
    hub.asked.clear()
    assert loads(hub, cache, "some-org/glm") == [expected]
    assert got(hub) == {second: 1, third: 1}


def test_a_branch_that_moves_on_meanwhile_is_not_mixed(hub, tmp_path):
    for seed, version in ((2, "main"), (4, "next")):
        write_checkpoint(tmp_path / version, seed)
        shard(tmp_path / version)
        publish(hub, "some-org/glm", tmp_path / version, version)
    loads(hub, tmp_path / "cache", "some-org/glm")
    asked = [path.split("/resolve/")[1].split("/")[0] for _, path, *_ in hub.asked if "/resolve/" in path]
    assert asked.count("main") <= 2  # the head and the content of the first file: the others are of its commit
    assert set(asked[2:]) == {sha_of("some-org/glm", "main")}


def test_a_revision_is_pinned(hub, tmp_path):
    for seed, revision in ((2, "main"), (4, "v1")):
        write_checkpoint(tmp_path / revision, seed)
        publish(hub, "some-org/glm", tmp_path / revision, revision)
    new, old = (summed(tmp_path / r) for r in ("main", "v1"))
    calls = ["some-org/glm", ["some-org/glm", "v1"], ["some-org/glm", sha_of("some-org/glm", "v1")]]
    assert loads(hub, tmp_path / "cache", *calls) == [new, old, old]
    assert new != old
    assert loads(hub, tmp_path / "cache", *calls, HF_HUB_OFFLINE="1") == [new, old, old]
    (told,) = loads(hub, tmp_path / "cache", ["some-org/glm", "v7"])
    for part in ("some-org/glm: has no revision 'v7'", "a branch, a tag or a commit", "/some-org/glm/commits"):
        assert part in told


def test_what_the_hub_does_not_give_is_an_error_that_says_what_to_type(hub, tmp_path):
    hub.refuses = {"org/gated": (403, "GatedRepo"), "org/private": (401, "RepoNotFound"), "org/down": (503, "")}
    hub.repos = {
        "org/pickled": {"main": {"config.json": b"{}", "pytorch_model.bin": b"x", "onnx/model.safetensors": b"x"}},
        "org/no-config": {"main": {"model.safetensors": b"x"}},
        "org/bad-index": {"main": {"config.json": b"{}", "model.safetensors.index.json": b"[" * 100_000}},
    }
    told = loads(
        hub, tmp_path, "org/gated", "org/private", "org/missing", "org/down", "org/pickled", "org/no-config",
        "org/bad-index", "org/what is this?", "https://huggingface.co/zai-org/GLM-4-9B-0414/tree/main", "./org/glm",
        "models/org/glm", "C:\\models\\glm",
    )  # fmt: skip
    expected = [
        (
            "org/gated: gated: ask its owners",
            f"http://127.0.0.1:{hub.server_port}/org/gated",
            "hf auth login",
            "HF_TOKEN",
        ),
        ("org/private: no such folder here, and no such repository", "if it is private", "HF_TOKEN"),
        ("org/missing: no such folder here, and no such repository", "/org/missing"),
        ("org/down: neither a folder here nor available", "503", "the path of a folder"),
        (
            "org/pickled: the repository has no model.safetensors",
            "pytorch_model.bin",
            "never pickle",
            "save_pretrained",
        ),
        ("org/no-config: the repository has no config.json",),
        ("model.safetensors.index.json: expected a weight_map",),
        ("org/what is this?: neither a folder here nor a hub id",),
        ("an address; give the hub id alone: 'zai-org/GLM-4-9B-0414'",),
        ("./org/glm: no such folder; give a folder",),
        ("models/org/glm: no such folder; give a folder",),
        ("C:\\models\\glm: no such folder; give a folder",),
    ]
    for parts, said in zip(expected, told, strict=True):
        for part in parts:
            assert part in said
    assert got(hub) == {"model.safetensors.index.json": 1}  # the others were found out before anything came
