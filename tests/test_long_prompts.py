"""Long prompts: in pieces they are what they are in one pass, and what is asked of them fits in memory."""

import subprocess
import sys

import pytest
import torch
from conftest import small_lens
from torch.testing import assert_close

from glmlens import only
from glmlens.analysis.chunked_runs import DecodingState, record_in_chunks, run_in_chunks
from glmlens.analysis.prompt_batch import PromptBatch
from glmlens.hook_points import HookError


def close(found, expected):
    assert_close(found, expected, rtol=0, atol=1e-9 * max(1.0, float(expected.abs().max())))


@pytest.fixture(params=[("glm", "eager"), ("glm4", "sdpa")], ids="-".join)
def lens(request):
    return small_lens(*request.param, dtype=torch.float64)


def double(x, point):
    return 2 * x


def test_a_prompt_in_pieces_is_the_prompt_in_one_pass(lens, tokens):
    rows = PromptBatch.from_prompt(lens, tokens)
    hooks = {"blocks.1.attn_out": only(double, positions=[0, 7]), "blocks.0.mlp_out": double}
    whole = lens.run_with_hooks(tokens, hooks)
    found = torch.cat([piece.logits for piece in run_in_chunks(rows, hooks=hooks, logits=True, size=4)], 1)
    close(found, whole)
    names = ["attn.q", "kv.k", "resid_post"]
    _, acts = lens.run_with_cache(tokens, names, hooks)
    for name, x in record_in_chunks(rows, names, hooks, size=2).items():
        close(x, acts[name])
    with pytest.raises(HookError, match="never came"):
        list(run_in_chunks(rows, hooks={"blocks.1.attn_out": only(double, positions=9)}, size=4))


def test_padded_prompts_in_pieces_are_each_its_own_prompt(lens, tokens):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :5] = 0
    rows = PromptBatch(lens, tokens, mask)
    found = torch.cat([piece.logits for piece in run_in_chunks(rows, logits=True, size=3)], 1)
    close(found[:1, 5:], lens(tokens[:1, 5:]))
    close(found[1:], lens(tokens[1:]))


def test_a_memory_goes_on_as_the_prompt(lens, tokens):
    memory = DecodingState.from_batch(PromptBatch.from_prompt(lens, tokens), size=3)
    run = lens.generate(memory.token[:, None], 3, kv=memory.kv, stop_ids=())
    assert torch.equal(run.new_tokens, lens.generate(tokens, 3, stop_ids=()).new_tokens)


LONG = """
import resource, torch, glmlens
from glmlens import analysis, cache, timeline
lens = glmlens.load(dtype="float32", attention="eager")
ids = torch.tensor(lens.tokenizer.list_word_ids())
tokens = ids[torch.randint(len(ids), (1, 8192), generator=torch.Generator().manual_seed(0))]
line = timeline.record_timeline(lens, tokens, 3, stop_ids=())
assert line.attention(1, 0).shape == (3, 8194)
line.rerun(2, hooks=cache.ablate(position=range(100)).hooks(lens))
memory = line.restore_state(1)
small = cache.close_up(lens)(cache.evict(cache.window(1024, sinks=4))(cache.quantise(4)(memory.kv)))
assert small.length == 1028
assert analysis.cache_reads(lens, memory).attention.shape[2] == 8193
analysis.leave_one_out(lens, memory, positions=range(0, 8192, 512))
analysis.score_parts(lens, tokens, 1, 0, query=[4000, 8191])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_8192_tokens_of_the_demo_fit_in_4_gigabytes():
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 4 * 2**30
