"""Broken checkpoints and saved files: each ends in one of our errors or can be used; none hangs, crashes, is costly."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import STRETCHED, write_checkpoint
from test_formats import as_chatglm, write_llama
from test_loading import shard
from test_text import tokenizer

import glmlens

FUZZ = Path(__file__).with_name("fuzz.py")
SAVED = Path(__file__).with_name("fuzz_saved.py")
MOST_BYTES = 200e6


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Small whole checkpoints to be broken: every way of naming tensors, one file and shards, with a tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    tied, own = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
    yarn = {"rope_parameters": {"rope_theta": 1e4, **STRETCHED["yarn"]["rope_scaling"]}}
    llama3 = {"rope_parameters": {"rope_theta": 1e4, **STRETCHED["llama3"]["rope_scaling"]}}
    kinds = [("glm", 2, {}), ("glm4", 3, yarn), ("tied", 6, tied), ("chatglm", 2, own), ("llama", 1, llama3)]
    for name, seed, changes in kinds:
        if name == "llama":
            write_llama(root / name, name, seed, vocab_size=320, **changes)
        else:
            write_checkpoint(root / name, seed, vocab_size=320, **changes)
        tokenizer().save(str(root / name / "tokenizer.json"))
        stated = {"chat_template": "{{ messages }}", "eos_token": "x", "added_tokens_decoder": {"1": {"content": "a"}}}
        (root / name / "tokenizer_config.json").write_text(json.dumps(stated))
    shard(root / "glm4", 2)
    as_chatglm(root / "chatglm")
    return root


def cases(script, bases, first, last):
    """What each case came to; one that ends the process is told of, and the next goes on in another."""
    while first < last:
        command = [sys.executable, str(script), str(bases), str(first), str(last)]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": PACKAGE}, capture_output=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        yield from (case | came for case, came in zip(lines[::2], lines[1::2], strict=False))
        assert lines, done.stderr.decode()
        if len(lines) % 2:
            why = done.stderr.decode(errors="replace")[-2000:]
            yield lines[-1] | {"outcome": f"NOT OURS: ended the process ({done.returncode}): {why}", "bytes": 0}
        first = [line["seed"] for line in lines if "seed" in line][-1] + 1


PACKAGE = str(FUZZ.parents[1])


def test_every_broken_checkpoint_ends_in_one_of_our_errors_or_runs(bases, request):
    count = request.config.getoption("--fuzz")
    found = list(cases(FUZZ, bases, 0, count))
    assert [case["seed"] for case in found] == list(range(count))
    bad = [case for case in found if case["outcome"].startswith("NOT OURS") or case["bytes"] > MOST_BYTES]
    assert not bad, "\n".join(map(json.dumps, bad))
    ran = Counter(case["outcome"] == "ran" for case in found)
    assert min(ran[True], ran[False]) > count / 10  # neither is everything refused nor is nothing broken


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One small file or folder of every kind that the package writes and reads again."""
    from fuzz_saved import save_all

    root = tmp_path_factory.mktemp("saved")
    save_all(glmlens.load(dtype="float32"), root)
    return root


def test_every_broken_saved_file_ends_in_one_of_our_errors_or_is_read(saved, request):
    count = request.config.getoption("--fuzz")
    found = list(cases(SAVED, saved, 0, count))
    assert [case["seed"] for case in found] == list(range(count))
    bad = [case for case in found if case["outcome"].startswith("NOT OURS") or case["bytes"] > MOST_BYTES]
    assert not bad, "\n".join(map(json.dumps, bad))
    kinds = Counter(case["base"] for case in found if case["outcome"] != "ran")
    assert kinds.keys() == {path.name for path in saved.iterdir()}
    assert Counter(case["outcome"] == "ran" for case in found)[True] > count / 50
