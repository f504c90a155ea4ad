"""Cache reads, leave-one-out and eviction: every number is that of a run by hand."""

import numpy as np
import pytest
import torch
from conftest import small_lens
from torch.testing import assert_close

from glmlens import analysis, cache
from glmlens.analysis.chunked_runs import DecodingState
from glmlens.analysis.prompt_batch import PromptBatch


@pytest.fixture(params=[("glm", "eager"), ("glm4", "eager"), ("glm4", "sdpa")], ids="-".join)
def lens(request):
    return small_lens(*request.param, dtype=torch.float64)


def test_cache_reads_of_a_step_are_those_of_a_pass_over_the_prompt(lens, tokens):
    prompt = tokens[:1]
    found = analysis.cache_reads(lens, prompt, 7, 8)
    eager = small_lens(lens.cfg.model_type, dtype=torch.float64)
    _, acts = eager.run_with_cache(prompt, ["attn.pattern", "attn.v"])
    by_source = analysis.logit_attribution(lens, prompt, 7, 8, by="source")
    assert np.allclose(found.direct.values, by_source.values, atol=1e-9)
    for layer, head in [(0, 0), (2, 3)]:
        weight = acts["attn.pattern", layer][0, head, -1]
        assert np.allclose(found.attention.values[layer, head], weight, atol=1e-9)
        for key in range(9):
            written = weight[key] * acts["attn.v", layer][0, key, head // 2] @ eager.W_O[layer, head]
            assert found.weighted.values[layer, head, key] == pytest.approx(float(written.norm()), abs=1e-9)
    grouped = found.sum_by_kv_head("direct", 2)
    assert np.allclose(grouped.values[:, 1], found.direct.values[:, 2:].sum(1))


def by_hand(lens, prompt, hidden):
    """The last logits of a pass whose last query does not see some entries: {layer: [(kv head, key), ...]}."""
    eager = small_lens(lens.cfg.model_type, dtype=torch.float64)

    def hide(places):
        def edit(x, point):
            for kv, key in places:
                x[:, 2 * kv : 2 * kv + 2, -1, key] = torch.finfo(x.dtype).min
            return x

        return edit

    hooks = {f"blocks.{layer}.attn.scores": hide(places) for layer, places in hidden.items()}
    return eager.run_with_hooks(prompt, hooks)[0, -1].log_softmax(-1), eager.run_with_hooks(prompt, hooks)[0, -1]


def test_leaving_out_one_entry_equals_a_pass_that_does_not_see_it(lens, tokens):
    prompt = tokens[:1]
    found = analysis.leave_one_out(lens, prompt, 5)
    (base, base_logits) = by_hand(lens, prompt, {})
    assert found.kl.shape == (3, 2, 8)
    for layer, kv, key in [(0, 0, 0), (1, 1, 4), (2, 0, 7), (2, 1, 2)]:
        without, logits = by_hand(lens, prompt, {layer: [(kv, key)]})
        kl = float((base.exp() * (base - without)).sum())
        assert found.kl.at(layer=layer, kv=kv, key=key) == pytest.approx(kl, abs=1e-9)
        lost = float(base_logits[5] - logits[5])
        assert found.logit.at(layer=layer, kv=kv, key=key) == pytest.approx(lost, abs=1e-9)


def test_leaving_out_a_position_equals_evicting_it(lens, tokens):
    prompt = tokens[:1]
    found = analysis.leave_one_out(lens, prompt, by="position", positions=[1, 6])
    state = DecodingState.from_batch(PromptBatch.from_prompt(lens, prompt))
    base = lens(prompt[:, -1:], kv=state.kv.fork())[0, -1].log_softmax(-1)
    for position in (1, 6):
        without = lens(prompt[:, -1:], kv=cache.evict(position=position)(state.kv))[0, -1].log_softmax(-1)
        kl = float((base.exp() * (base - without)).sum())
        assert found.kl.at(key=position) == pytest.approx(kl, abs=1e-9)
    assert np.isnan(found.kl.values[[0, 2, 3, 4, 5, 7]]).all()


def test_an_evicted_entry_is_not_ranked_and_the_curve_starts_with_the_smallest_effect(tokens):
    lens = small_lens(dtype=torch.float64)
    state = DecodingState.from_batch(PromptBatch.from_prompt(lens, tokens[:1]))
    hidden = cache.evict(position=3)(state.kv)
    found = analysis.eviction_curve(lens, DecodingState(hidden, state.token))
    assert len(found.alone.values) == 7
    assert (np.diff(found.alone.values) >= 0).all()
    assert found.together.at(dropped="0") == pytest.approx(0, abs=1e-12)
    assert found.together.at(dropped="1") == pytest.approx(found.alone.values[0], abs=1e-12)


@pytest.mark.parametrize("by", ["position", "entry"])
def test_evicting_the_first_n_has_the_kl_of_a_pass_without_them(lens, tokens, by):
    prompt = tokens[:1]
    found = analysis.eviction_curve(lens, prompt, by=by, counts=[0, 1, 5])
    base, _ = by_hand(lens, prompt, {})
    for n in (1, 5):
        hidden = {layer: [] for layer in range(3)}
        for name in found.alone.labels["entry"][:n]:
            if by == "position":
                for layer in range(3):
                    hidden[layer] += [(kv, int(name.split()[0])) for kv in range(2)]
            else:
                layer, kv, key = name.split(", ")
                hidden[int(layer.split()[1])].append((int(kv.split()[1]), int(key.split()[0])))
        without, _ = by_hand(lens, prompt, hidden)
        kl = float((base.exp() * (base - without)).sum())
        assert found.together.at(dropped=str(n)) == pytest.approx(kl, abs=1e-9)


def test_summed_attention_is_that_of_the_full_pattern(lens, tokens):
    eager = small_lens(lens.cfg.model_type, dtype=torch.float64)
    _, acts = eager.run_with_cache(tokens[:1], "attn.pattern")
    found = analysis.sum_attention(lens, tokens[:1])
    assert_close(found, torch.stack([acts["attn.pattern", i][0].sum(1) for i in range(3)]).float())
    keep = cache.keep_heavy_hitters(found.sum((0, 1))[None, :-1], 3, recent=1)
    kv = DecodingState.from_batch(PromptBatch.from_prompt(lens, tokens[:1])).kv
    assert cache.evict(keep)(kv).length == 4


def test_a_step_after_an_evicted_newest_entry_keeps_its_position(tokens):
    lens = small_lens(dtype=torch.float64)
    state = DecodingState.from_batch(PromptBatch.from_prompt(lens, tokens[:1]))
    less = DecodingState(cache.evict(position=7)(state.kv), state.token)
    found = analysis.cache_reads(lens, less)
    hooks = cache.evict(position=7).hooks(lens)
    _, acts = lens.run_with_cache(state.token[:, None], "attn.pattern", hooks, kv=state.kv.fork())
    assert np.allclose(found.attention.values, torch.stack([acts["attn.pattern", i][0, :, 0] for i in range(3)]))
    assert found.attention.labels["key"][-2:] == [f"7 ⟨{int(tokens[0, 7])}⟩ (dropped)", "8 itself"]
    alone = analysis.leave_one_out(lens, less, by="position").kl.values
    assert np.isnan(alone).tolist() == [False] * 7 + [True]


def test_arguments_that_do_not_fit_are_errors_with_the_reason(lens, tokens):
    with pytest.raises(ValueError, match="one prompt at a time"):
        analysis.leave_one_out(lens, tokens)
    with pytest.raises(ValueError, match="'entry', 'position'"):
        analysis.leave_one_out(lens, tokens[:1], by="layer")
    with pytest.raises(IndexError, match=r"no entry at positions \[8\]; there are 0 to 7"):
        analysis.leave_one_out(lens, tokens[:1], positions=[8])
    with pytest.raises(ValueError, match="positions came out empty"):
        analysis.leave_one_out(lens, tokens[:1], positions=[])
    with pytest.raises(ValueError, match="there are 8 entries to evict"):
        analysis.eviction_curve(lens, tokens[:1], counts=[9])
    with pytest.raises(ValueError, match="leaves the cache empty"):
        analysis.cache_reads(lens, tokens[:1, :1])
