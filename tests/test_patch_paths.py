"""Path patching: against hooks written out, and against edges."""

import numpy as np
import pytest
import torch
from conftest import small_lens

from glmlens import circuits, patch
from glmlens.patch import Site

DRAW = torch.Generator().manual_seed(0)
CLEAN, CORRUPT = torch.randint(10, 101, (2, 2, 7), generator=DRAW)
PAIR = (5, 9)


def difference(logits):
    return logits[:, -1, PAIR[0]] - logits[:, -1, PAIR[1]]


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
@pytest.mark.parametrize(("point", "axis", "place"), [("attn.q", "head", 3), ("attn.k", "kv", 1), ("attn.v", "kv", 0)])
@pytest.mark.parametrize("mlps", ["recomputed", "frozen"])
def test_a_path_equals_three_runs_with_hooks_written_out(model_type, point, axis, place, mlps):
    lens = small_lens(model_type, dtype=torch.float64)
    clean, corrupt = (lens.run_with_cache(t, "all")[1] for t in (CLEAN, CORRUPT))
    found = circuits.path_patch(lens, CLEAN, CORRUPT, Site(point, layer=2, **{axis: place}), metric=PAIR, mlps=mlps,
                             progress=False)  # fmt: skip
    for layer, head in ((0, 1), (1, 3)):

        def freeze(x, p, layer=layer, head=head):
            x = clean[p.name].clone()
            if p.layer == layer and p.local == "attn.z":
                x[:, :, head] = corrupt[p.name][:, :, head]
            return x

        hooks = [("attn.z", freeze)] + ([("mlp_out", freeze)] if mlps == "frozen" else [])
        name = f"blocks.2.{point}"
        received = lens.run_with_cache(CLEAN, name, hooks)[1][name]

        def receive(x, p, received=received):
            x[:, :, place] = received[:, :, place]
            return x

        change = difference(lens.run_with_hooks(CLEAN, {name: receive})) - difference(lens(CLEAN))
        assert found.at(layer=layer, head=head) == pytest.approx(float(change.mean()), abs=1e-12)
    assert np.isnan(found.values[2]).all()  # they write after the receiver has read


def test_a_path_to_the_logits_is_a_directly_changed_residual_stream():
    lens = small_lens(dtype=torch.float64)
    found = circuits.path_patch(lens, CLEAN, CORRUPT, Site("logits"), metric=PAIR, mlps="frozen", progress=False)
    a, b = (lens.run_with_cache(t, ["attn.result", "resid_post"])[1] for t in (CLEAN, CORRUPT))
    for layer, head in ((0, 0), (1, 2), (2, 3)):
        moved = a["resid_post", 2] + (b["attn.result", layer] - a["attn.result", layer])[:, :, head]
        change = difference(lens(moved, start_layer=3, attention_mask=torch.ones_like(CLEAN))) - difference(lens(CLEAN))
        assert found.at(layer=layer, head=head) == pytest.approx(float(change.mean()), abs=1e-12)


def test_receivers_that_are_none_are_refused(lens):
    for site in (Site("attn.z", layer=1), Site("attn.q"), Site("attn.q", layer=9)):
        with pytest.raises(patch.PatchError):
            circuits.path_patch(lens, CLEAN, CORRUPT, site, metric=PAIR, progress=False)
