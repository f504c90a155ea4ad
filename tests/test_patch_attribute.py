"""Attribution patching: against finite differences, against exact patterns, and with what cancels."""

import numpy as np
import pytest
import torch
from conftest import small_lens

import glmlens
from glmlens import patch
from glmlens.patch import Intervention, Site
from glmlens.patch.attribution_patching import leave_one_key_out
from glmlens.patch.gradients import record_gradients
from glmlens.tasks import ioi

DRAW = torch.Generator().manual_seed(0)
CLEAN, CORRUPT = torch.randint(10, 101, (2, 2, 7), generator=DRAW)
PAIR = (5, 9)


def difference(logits):
    return logits[:, -1, PAIR[0]] - logits[:, -1, PAIR[1]]


METRIC = patch.Metric("difference", lambda logits, _: difference(logits))


@pytest.mark.parametrize(
    ("point", "over"),
    [("attn.z", ("layer", "head")), ("resid_pre", ("layer", "pos")), ("mlp.post", ("pos", "layer")),
     ("attn.pattern", ("layer", "head", "query", "key")), ("kv.v", ("layer", "kv"))],
)  # fmt: skip
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_attribution_is_the_slope_of_a_small_step_to_the_other_run(point, over, direction):
    lens = small_lens("glm4", dtype=torch.float64)
    found = patch.attribution_patch(lens, CLEAN, CORRUPT, point, over=over, metric=PAIR, direction=direction)
    base, source = (CLEAN, CORRUPT) if direction == "noise" else (CORRUPT, CLEAN)
    other = lens.run_with_cache(source, point)[1]
    axes = next(p.axes for p in lens.points() if p.local == point)
    for place in [(0,) * len(over), tuple(n - 1 for n in found.shape)]:
        where = dict(zip(over, place, strict=True))
        layer = where.pop("layer")
        at = tuple(where.get(axis, slice(None)) for axis in axes)

        def step(size, layer=layer, at=at):
            def move(x, p):
                x[at] += size * (other[p.name][at] - x[at])
                return x

            return float(difference(lens.run_with_hooks(base, {f"blocks.{layer}.{point}": move})).mean())

        slope = (step(1e-5) - step(-1e-5)) / 2e-5
        assert found.values[place] == pytest.approx(slope, rel=1e-4, abs=1e-8)


def dot(lens, name, hooks):
    """(A' - A) · ∂m/∂A per example, the pattern A' that hooks make."""
    slope = record_gradients(lens, CLEAN, METRIC, [name]).gradients[name]
    before, after = lens.run_with_cache(CLEAN, name)[1][name], lens.run_with_cache(CLEAN, name, hooks)[1][name]
    return (after - before) * slope


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_corrected_queries_and_keys_use_the_pattern_that_the_change_makes(model_type):
    lens = small_lens(model_type, dtype=torch.float64)
    other = lens.run_with_cache(CORRUPT, "all")[1]
    queries = patch.attribution_patch(
        lens, CLEAN, CORRUPT, "attn.q", over=("layer", "head", "pos"), metric=PAIR, method="atp*"
    )
    single = patch.attribution_patch(
        lens, CLEAN, CORRUPT, "kv.k", over=("layer", "head", "key"), metric=PAIR, method="atp*"
    )
    groups = patch.attribution_patch(
        lens, CLEAN, CORRUPT, "kv.k", over=("layer", "kv", "key"), metric=PAIR, method="atp*"
    )
    for layer, pos in ((0, 4), (2, 6), (1, 2)):

        def put(x, point, pos=pos):
            x[:, pos] = other[point.name][:, pos]
            return x

        name = f"blocks.{layer}.attn.pattern"
        moved = dot(lens, name, {f"blocks.{layer}.attn.q": put})[:, :, pos].sum(-1).mean(0)
        np.testing.assert_allclose(queries.values[layer, :, pos], moved, rtol=1e-9)
        moved = dot(lens, name, {f"blocks.{layer}.kv.k": put}).sum((2, 3)).mean(0)
        np.testing.assert_allclose(single.values[layer, :, pos], moved, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(groups.values[layer, :, pos], moved.view(2, 2).sum(1), rtol=1e-9, atol=1e-12)


def test_corrections_hold_where_attention_is_saturated():
    """In the small GLM inside scores lie apart by hundreds: exponentials of their changes are not finite numbers."""
    lens, exact = (glmlens.load(dtype=name) for name in ("float32", "float64"))
    examples = ioi.examples(lens, 8, seed="saturated").of_length()
    for point, over in (("attn.q", ("layer", "head")), ("kv.k", ("layer", "head", "key"))):
        asked = (examples, "abc", point)
        found, right = (patch.attribution_patch(one, *asked, over=over, method="atp*").values for one in (lens, exact))
        assert np.abs(right).max() > 0.5
        np.testing.assert_allclose(found, right, atol=1e-3 * np.abs(right).max())


def test_leaving_a_key_out_is_what_the_other_keys_have_alone():
    scores = torch.tensor([[300.0, 1.0, 0.5, -200.0], [2.0, 2.0, 1.0, torch.finfo(torch.float64).min]]).double()
    slope = torch.randn(2, 4, generator=DRAW).double()
    rest, mean = leave_one_key_out(scores, slope)
    for row in range(2):
        for k in range(4):
            kept = [j for j in range(4) if j != k]
            assert float(rest[row, k]) == pytest.approx(float(scores[row, kept].logsumexp(0)), rel=1e-12)
            alone = float((scores[row, kept].softmax(0) * slope[row, kept]).sum())
            assert float(mean[row, k]) == pytest.approx(alone, rel=1e-9, abs=1e-12)


def test_dropped_gradients_are_the_mean_magnitude_without_each_layer():
    lens = small_lens(dtype=torch.float64)
    found = patch.attribution_patch(lens, CLEAN, CORRUPT, "resid_pre", over=("layer",), metric=PAIR, drop=True)
    a, b = (lens.run_with_cache(t, "resid_pre")[1]["resid_pre"] for t in (CLEAN, CORRUPT))
    total, mask = torch.zeros(3, 2, dtype=torch.float64), torch.ones_like(CLEAN)
    for dropped in range(3):
        resid, leaves = lens.W_E[CLEAN], []
        for i in range(3):
            leaves.append(resid if resid.requires_grad else resid.requires_grad_())
            after = lens(resid, start_layer=i, stop_layer=i + 1, attention_mask=mask)
            resid = resid + (after - resid).detach() if i == dropped else after
        slopes = torch.autograd.grad(difference(lens(resid, start_layer=3, attention_mask=mask)).sum(), leaves)
        total += torch.stack([((b[i] - a[i]) * slopes[i]).sum((1, 2)).abs() for i in range(3)])
    np.testing.assert_allclose(found.values, (total / 2).mean(1), rtol=1e-9)


def test_dropping_at_heads_and_at_their_sum_agree():
    """Without a norm behind it, attention's output is linear in its heads, in every pass."""
    lens = small_lens(dtype=torch.float64)
    asked = {"over": ("layer",), "metric": PAIR, "drop": True}
    heads, whole = (patch.attribution_patch(lens, CLEAN, CORRUPT, point, **asked) for point in ("attn.z", "attn_out"))
    np.testing.assert_allclose(heads.values, whole.values, rtol=1e-9)


def test_attribution_points_to_what_a_sweep_finds():
    lens = small_lens(dtype=torch.float64)
    near = CLEAN.clone()
    near[:, 3] = CORRUPT[:, 3]
    estimated = patch.attribution_patch(lens, CLEAN, near, "resid_pre", over=("layer", "pos"), metric=PAIR)
    site = Intervention(Site("resid_pre", layer=2, pos=6), patch.Swap())
    exact = patch.evaluate(lens, CLEAN, [[site]], PAIR, sources=near, progress=False)[0]
    change = float((exact - difference(lens(CLEAN))).mean())
    assert np.sign(estimated.at(layer=2, pos=6)) == np.sign(change)


@pytest.mark.parametrize("over", [("layer", "pos"), ("pos",)])
def test_places_are_called_as_a_sweep_calls_them(over):
    lens = glmlens.load(dtype="float32")
    clean, corrupt = ("When Mary and John went to the store, John", "When Mary and John went to the store, Mary")
    asked = {"over": over, "metric": (" gave", " sent")}
    found = patch.attribution_patch(lens, clean, corrupt, "resid_pre", **asked)
    site = Site("resid_pre", layer=None if "layer" in over else 0)
    swept = patch.sweep(lens, clean, corrupt, site, **asked, progress=False)
    assert found.labels == swept.labels
    assert found.labels["pos"][-1] == "11 ·John"


def test_what_cannot_be_attributed_is_said(lens):
    for asked in ({"point": "attn.v", "method": "atp*"}, {"point": "attn.q", "over": ("kv",)}, {"direction": "both"}):
        with pytest.raises(patch.PatchError):
            patch.attribution_patch(lens, CLEAN, CORRUPT, **{"point": "attn.z", "metric": PAIR, **asked})
