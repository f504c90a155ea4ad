"""Interventions: plain data that says where and what, and never fails silently."""

import pytest
import torch
from conftest import small_lens

from glmlens import patch
from glmlens.hook_points import HookError
from glmlens.patch import Intervention, PatchError, Site
from glmlens.patch.apply import AppliedInterventions

TOKENS = torch.randint(10, 101, (1, 9), generator=torch.Generator().manual_seed(0))
OTHERS = torch.randint(10, 101, (3, 9), generator=torch.Generator().manual_seed(1))
DIRECTION = tuple(torch.randn(48, generator=torch.Generator().manual_seed(2)).tolist())


def halved(x):
    return x / 2


def changes(lens):
    return [
        patch.Swap.of_prompt(lens, OTHERS[0]),
        patch.Zero(),
        patch.Mean.of_prompts(lens, OTHERS),
        patch.Mean.of_prompts(lens, OTHERS, by_position=True),
        patch.Resample.of_prompts(lens, OTHERS, seed=4),
        patch.Noise.of_lens(lens, 3.0, seed=1),
        patch.Apply(halved),
        patch.Put(0.25),
        patch.Put(DIRECTION),
        patch.Scale(-1.5),
        patch.Add(DIRECTION, 2.0),
        patch.Remove(DIRECTION),
    ]


def expected(lens, x, which):
    """What each of `changes` should make of x [batch, pos, model] at blocks.1.resid_mid, said in torch."""
    others = lens.run_with_cache(OTHERS, "resid_mid")[1]["resid_mid", 1]
    v = torch.tensor(DIRECTION)
    drawn = int(torch.randint(3, (), generator=torch.Generator().manual_seed(4)))
    return [
        others[:1], 0 * x, others.mean((0, 1)).expand_as(x), others.mean(0, keepdim=True), others[drawn : drawn + 1],
        None, x / 2, 0 * x + 0.25, v.expand_as(x), -1.5 * x, x + 2 * v, x - (x @ v)[..., None] * v / v.dot(v),
    ][which]  # fmt: skip


@pytest.mark.parametrize("which", range(12))
@pytest.mark.parametrize("pos", [None, (2, 5)])
def test_a_change_does_what_it_says(lens, which, pos):
    one = Intervention(Site("resid_mid", layer=1, pos=pos), changes(lens)[which])

    def edit(x, point):
        new = expected(lens, x, which)
        at = slice(None) if pos is None else list(pos)
        x[:, at] = new[:, at]
        return x

    found = patch.run_with_interventions(lens, TOKENS, one)
    tolerance = {"rtol": 0, "atol": 1e-5 * float(found.abs().max())}
    if which != 5:  # noise has no other expression
        torch.testing.assert_close(found, lens.run_with_hooks(TOKENS, {"blocks.1.resid_mid": edit}), **tolerance)
    metric = patch.Metric("one", lambda logits, _: logits[:, -1, 7])
    many = patch.evaluate(lens, TOKENS, [[one]], metric, progress=False)
    torch.testing.assert_close(many[0].float(), found[:, -1, 7], **tolerance)  # the engine says the same


def test_noise_is_scaled_to_the_embeddings_and_the_same_for_the_same_seed(lens):
    big = small_lens(hidden_size=4096, num_hidden_layers=1)
    seen = {}
    noise = patch.Noise.of_lens(big, 3.0, seed=1)
    before = big.run_with_cache(TOKENS, "embed")[1]["embed"]
    one = Intervention(Site("embed", pos=(2, 3)), noise)

    def look(x, point):
        seen["after"] = x
        return x

    applied = AppliedInterventions.compile(big, [one], 9)
    big.run_with_hooks(TOKENS, [*applied.hooks, ("embed", look)])
    added = (seen["after"] - before)[0]
    assert (added[[0, 1, 4, 5, 6, 7, 8]] == 0).all()
    assert float(added[2:4].std()) == pytest.approx(3 * float(big.W_E.std()), rel=0.05)
    again = patch.run_with_interventions(
        lens, TOKENS, Intervention(Site("embed", pos=2), patch.Noise.of_lens(lens, 3.0, seed=1))
    )
    assert torch.equal(
        again,
        patch.run_with_interventions(
            lens, TOKENS, Intervention(Site("embed", pos=2), patch.Noise.of_lens(lens, seed=1))
        ),
    )


def test_a_mean_takes_prompts_of_any_length_unless_by_position(lens):
    short = [row[:n].tolist() for row, n in zip(OTHERS, (4, 9, 6), strict=True)]
    one = Intervention(Site("attn.z", layer=0, head=2), patch.Mean.of_prompts(lens, short))
    rows = [lens.run_with_cache(torch.tensor([r]), "attn.z")[1]["attn.z", 0][0] for r in short]

    def edit(x, point):
        x[:, :, 2] = torch.cat(rows).mean(0)[2]
        return x

    torch.testing.assert_close(
        patch.run_with_interventions(lens, TOKENS, one), lens.run_with_hooks(TOKENS, {"blocks.0.attn.z": edit})
    )
    with pytest.raises(PatchError, match="tokens"):
        patch.run_with_interventions(
            lens, TOKENS, Intervention(one.site, patch.Mean.of_prompts(lens, short, by_position=True))
        )


def test_interventions_print_compare_and_save(lens, tmp_path):
    site = Site("blocks.1.resid_mid", pos=("S2", 4))
    asked = [Intervention(site, change) for change in changes(lens)]
    assert asked == [Intervention(Site("resid_mid", layer=1, pos=("S2", 4)), change) for change in changes(lens)]
    assert len(set(asked)) == 12
    assert str(asked[1]) == "resid_mid [layer 1, pos S2+4] <- zero"
    patch.save_interventions(tmp_path / "these.json", asked, lens)
    functions = {"halved": halved}
    assert patch.load_interventions(tmp_path / "these.json", lens, functions=functions) == asked
    other = small_lens(seed=5)
    with pytest.raises(PatchError, match="this is"):
        patch.load_interventions(tmp_path / "these.json", other)
    assert patch.load_interventions(tmp_path / "these.json", other, other_model=True, functions=functions) == asked
    with pytest.raises(PatchError, match="cannot be saved"):
        patch.save_interventions(tmp_path / "x.json", [Intervention(site, patch.Apply(lambda x: x))], lens)


def test_an_intervention_that_comes_to_nothing_is_an_error(lens):
    same = Intervention(Site("attn.z", layer=1), patch.Scale(1.0))
    with pytest.raises(PatchError, match=r"changed nothing.*allow='no change'"):
        patch.run_with_interventions(lens, TOKENS, same)
    assert torch.equal(patch.run_with_interventions(lens, TOKENS, same, allow="no change"), lens(TOKENS))
    with pytest.raises(PatchError, match="changed nothing"):
        patch.evaluate(lens, TOKENS, [[same]], (5, 6), progress=False)
    late = Intervention(Site("attn.z", layer=1, pos=30), patch.Zero())
    with pytest.raises(PatchError, match="position 30 asked for"):
        patch.run_with_interventions(lens, TOKENS, late)
    with pytest.raises(PatchError, match="never fired"):
        patch.generate_with_interventions(lens, TOKENS, 3, late)
    with pytest.raises(PatchError, match="came out empty"):
        Site("attn.z", pos=())
    with pytest.raises(PatchError, match="names no run"):
        patch.run_with_interventions(lens, TOKENS, Intervention(Site("attn.z", layer=1), patch.Swap()))
    with pytest.raises(PatchError, match="a vector of 48 for a place that is 16 wide"):
        patch.run_with_interventions(lens, TOKENS, Intervention(Site("attn.z", layer=1), patch.Add(DIRECTION)))
    with pytest.raises((PatchError, HookError), match="Did you mean"):
        patch.run_with_interventions(lens, TOKENS, Intervention(Site("atn.z", layer=1), patch.Zero()))


@pytest.mark.parametrize("point", ["resid_post", "kv.v", "attn.pattern", "mlp.post"])
def test_a_cached_decode_is_changed_as_an_uncached_one(lens, point):
    """The positions are absolute: what is generated with a cache is what whole forwards would say."""
    where = {"head": 3} if point in ("kv.v", "attn.pattern") else {}
    where |= {"key": (0, 2)} if point == "attn.pattern" else {}
    one = Intervention(Site(point, layer=1, pos=(4, 8, 9, 11), **where), patch.Scale(-2.0))
    run = patch.generate_with_interventions(lens, TOKENS, 5, one, stop_ids=())
    tokens = TOKENS
    for _ in range(5):
        here = [p for p in (4, 8, 9, 11) if p < tokens.shape[1]]
        logits = patch.run_with_interventions(lens, tokens, Intervention(one.site.at(pos=here), one.do))
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(run.tokens, tokens)
    assert not torch.equal(run.tokens, lens.generate(TOKENS, 5, stop_ids=()).tokens)
