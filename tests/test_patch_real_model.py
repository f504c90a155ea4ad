"""Indirect objects in a real pretrained model: facts about it, cross-checked with hooks on transformers' own model."""

import pytest
import torch
from conftest import reference

import glmlens
from glmlens import circuits, patch
from glmlens.patch import Site
from glmlens.tasks import ioi

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def lens(real_model):
    return glmlens.load(real_model, dtype="float32")


@pytest.fixture(scope="module")
def examples(lens):
    return ioi.examples(lens, 60)


def test_it_identifies_indirect_objects(lens, examples):
    found = torch.cat([examples[i : i + 20].measure(lens(examples[i : i + 20].tokens)) for i in range(0, 60, 20)])
    assert float((found > 0).float().mean()) >= 0.97
    assert float(found.mean()) == pytest.approx(4.5, abs=0.5)


def test_the_heads_with_the_largest_direct_effect_are_known(lens):
    """By path patching to the logits; direct logit attribution names the same."""
    some = ioi.examples(lens, 40).of_length()[:4]
    found = circuits.path_patch(lens, some, "flip", Site("logits"), mlps="frozen", progress=False)
    assert [place for place, _ in found.top(2)] == [("23", "3"), ("29", "1")]
    assert {place for place, _ in found.top(5)} == {("23", "3"), ("29", "1"), ("24", "4"), ("23", "0"), ("29", "0")}
    assert found.at(layer=24, head=4) > 0 > found.at(layer=23, head=3)  # a negative name mover among name movers


def test_head_patching_equals_hooks_on_transformers(lens, real_model):
    theirs = reference(real_model, dtype=torch.float32)
    example = ioi.examples(lens, 1)
    clean, corrupt = (torch.tensor(rows) for rows in (example.tokens, example.counterfactual("flip")))
    found = patch.sweep(lens, example, "flip", Site("attn.z", layer=(8, 23, 29)), over=("layer", "head"),
                        normalise=False, progress=False)  # fmt: skip
    kept, d = {}, lens.cfg.d_head
    with torch.no_grad():
        for row, layer in enumerate((8, 23, 29)):
            out = theirs.model.layers[layer].self_attn.o_proj
            handle = out.register_forward_pre_hook(lambda m, args: kept.update(z=args[0].clone()))
            theirs(clean)
            handle.remove()

            def put(m, args):
                z = args[0].clone()
                for head in range(lens.cfg.n_heads):
                    here = slice(head * d, (head + 1) * d)
                    z[head, :, here] = kept["z"][0, :, here]
                return (z,)

            handle = out.register_forward_pre_hook(put)
            logits = theirs(corrupt.expand(lens.cfg.n_heads, -1)).logits
            handle.remove()
            expected = [float(example.measure(logits[[head]])) for head in range(lens.cfg.n_heads)]
            largest = float(logits.abs().max())
            difference = (torch.tensor(expected) - torch.from_numpy(found.values[row])).abs().max()
            assert float(difference) <= 1e-5 * largest
