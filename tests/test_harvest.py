"""Harvests: any number of prompts into shards, killed and gone on with, nothing lost and nothing twice."""

import itertools
import signal
import subprocess
import sys
import time

import pytest
import torch

import glmlens
from glmlens.demo.world import generate_documents
from glmlens.hook_points import HookError

POINTS = ["resid_post", "blocks.1.attn.z"]


@pytest.fixture(scope="module")
def inside():
    return glmlens.load(dtype="float32")


def texts(n, seed="harvest"):
    return list(itertools.islice(generate_documents(seed), n))


def test_a_harvest_holds_every_token_of_every_prompt(tmp_path):
    inside = glmlens.load(dtype="float64")  # beside longer prompts, sums round otherwise
    prompts = texts(30)
    found = inside.harvest(prompts, POINTS, tmp_path, batch=7, shard_tokens=100)
    assert len(found.manifest["shards"]) > 3
    rows = [inside.to_tokens(text)[0] for text in prompts]
    assert torch.equal(found.tokens, torch.cat(rows))
    assert torch.equal(found.positions, torch.cat([torch.arange(len(row)) for row in rows]))
    assert torch.equal(found.prompts, torch.cat([torch.full((len(row),), i) for i, row in enumerate(rows)]))
    alone = [inside.run_with_cache(text, POINTS, logits=False)[1] for text in prompts]
    for name, layer in (("resid_post", 3), ("attn.z", 1)):
        expected = torch.cat([acts[name, layer][0] for acts in alone])
        assert float((found[name, layer] - expected).abs().max()) < 1e-9
        assert torch.equal(torch.cat(list(found.batches((name, layer), 64))), found[name, layer])
    assert len(found) == sum(map(len, rows)) == len(glmlens.load_harvest(tmp_path))


KILLED = """
import itertools, sys, glmlens
from glmlens.demo.world import generate_documents
lens = glmlens.load(dtype="float32")
prompts = list(itertools.islice(generate_documents("harvest"), 400))
lens.harvest(prompts, "resid_post", sys.argv[1], batch=4, shard_tokens=300)
"""


def test_killed_at_any_moment_it_goes_on_with_nothing_lost_and_nothing_twice(inside, tmp_path):
    whole = inside.harvest(texts(400), "resid_post", tmp_path / "whole", batch=4, shard_tokens=300)
    out, killed = tmp_path / "killed", 0
    for after in (1, 4, 9):  # shards
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stderr=subprocess.DEVNULL)
        while child.poll() is None and len(list(out.glob("shard-*.safetensors"))) < after:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
    assert killed == 3
    assert 0 < len(glmlens.load_harvest(out)) < len(whole)
    found = inside.harvest(texts(400), "resid_post", out, batch=4, shard_tokens=300)
    for what in ("tokens", "positions", "prompts"):
        assert torch.equal(getattr(found, what), getattr(whole, what))
    assert float((found["resid_post", 3] - whole["resid_post", 3]).abs().max()) < 1e-3
    assert found.manifest["done"]
    again = inside.harvest(texts(400), "resid_post", out)
    assert again.manifest == found.manifest
    more = inside.harvest(texts(420), "resid_post", out)
    assert len(more) > len(found)


def test_interrupting_keeps_what_there_is(inside, tmp_path):
    def interrupted():
        yield from texts(20)
        raise KeyboardInterrupt

    found = inside.harvest(interrupted(), "resid_post", tmp_path, batch=8)
    assert not found.manifest["done"]
    assert int(found.prompts.max()) == 15
    assert len(inside.harvest(texts(30), "resid_post", tmp_path)) == sum(len(inside.to_tokens(t)[0]) for t in texts(30))


def test_models_points_and_prompts_are_not_mixed(inside, lens, tmp_path):
    inside.harvest(texts(5), "resid_post", tmp_path)
    with pytest.raises(ValueError, match=f"with model '{inside.model_hash}'"):
        lens.harvest([[1, 2, 3]], "resid_post", tmp_path)
    with pytest.raises(ValueError, match="with names"):
        inside.harvest(texts(5), "resid_pre", tmp_path)
    with pytest.raises(ValueError, match="made of other prompts"):
        inside.harvest(texts(5, "others"), "resid_post", tmp_path)
    with pytest.raises(HookError, match="no row per token"):
        inside.harvest(texts(5), "attn.pattern", tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="holds no harvest"):
        glmlens.load_harvest(tmp_path / "b")


MEMORY = """
import itertools, sys, glmlens
from glmlens.demo.world import generate_documents
lens = glmlens.load(dtype="float32")
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
lens.harvest(itertools.islice(generate_documents(1), 1000), "resid_post", sys.argv[1] + "/small", batch=64)
before = peak()
found = lens.harvest(itertools.islice(generate_documents(1), 7000), "resid_post", sys.argv[1] + "/large", batch=64)
print(len(found), peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_thousand_tokens_take_no_more_memory_than_one_shard(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    tokens, more = done.stdout.split()
    assert int(tokens) > 100_000
    assert float(more) < 150  # MB; all of it would be 330
