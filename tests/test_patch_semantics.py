"""One semantics for interventions: a forward, a generation, an evaluation, a sweep and plain hooks say the same."""

import random
from itertools import product

import pytest
import torch
from conftest import small_lens

from glmlens import patch, timeline
from glmlens.hook_points import ROOT_POINTS
from glmlens.patch import Intervention, PatchError, Site

LENGTH, LISTS = 8, 10  # lists of interventions at a time
SIZES = {"head": 4, "kv": 2, "pair": 4, "rotated": 8, "rest": 8, "d": 16, "mlp": 56, "model": 48, "vocab": 101}
SIZES |= {"one": 1, "key": LENGTH}
BOTH = ("never fired", "no change")
WEIGHTS = torch.randn(LENGTH, 101, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def halved_and_shifted(x):
    return x / 2 + 0.1


def centred(x):
    return x - x.mean(0)


def prompts(draw):
    """Four rows of ids, of which each of the last two differs from one of the first two in some tokens."""
    rows = [[draw.randrange(10, 101) for _ in range(LENGTH)] for _ in range(2)]
    others = [list(row) for row in rows]
    for row in others:
        for at in draw.sample(range(LENGTH), draw.choice((1, 2, LENGTH))):
            row[at] = (row[at] - 10 + draw.randrange(1, 91)) % 91 + 10
    return rows, others


def some(draw, size, most=3):
    return tuple(sorted(draw.sample(range(size), min(size, draw.randint(1, most)))))


def random_site(draw, local):
    # edits at neighbouring points are asked for often: their order is the forward's
    point = draw.choice([*local, "embed", "resid_pre", "resid_post", "kv.k", "kv.v", "attn.z"])
    where = {}
    if point not in ROOT_POINTS:
        where["layer"] = draw.choice([None, draw.randrange(3), some(draw, 3)])
    if draw.random() < 0.7:
        where["pos"] = draw.choice([some(draw, LENGTH), "end", (draw.randrange(LENGTH - 1), "end")])
    if point in ("kv.k", "kv.v") and draw.random() < 0.4:
        where["head"] = some(draw, 4)
    axes = Site(point, **where).axes[2:]
    for axis in axes:
        name = {"rotated": draw.choice(("pair", "d")), "rest": "d"}.get(axis, axis)
        if axis not in ("one", "vocab") and name not in where and draw.random() < 0.4:
            where[name] = some(draw, SIZES["pair" if name == "pair" else axis])
    site = Site(point, **where)
    chosen = {"rotated": [site.pair and [0] * 2 * len(site.pair), site.d], "rest": [site.d]}
    last = next((c for c in chosen.get(axes[-1], [getattr(site, axes[-1], None)]) if c), None)
    return site, SIZES[axes[-1]] if last is None else len(last)


def random_change(draw, site, width):
    vector = tuple(draw.gauss(0, 1) for _ in range(width))
    others = [[draw.randrange(10, 101) for _ in range(LENGTH)] for _ in range(3)]
    ragged = others if "query" in site.axes else [row[:n] for row, n in zip(others, (3, LENGTH, 5), strict=True)]
    kinds = [
        patch.Swap(), patch.Swap(), patch.Swap(tuple(others[0])), patch.Zero(), patch.Mean(ragged),
        patch.Mean(others, by_position=True), patch.Resample(others, seed=draw.randrange(9)),
        patch.Noise(3, seed=draw.randrange(9)), patch.Noise(0.5, seed=draw.randrange(9), unit=1.0),
        patch.Apply(halved_and_shifted), patch.Apply(centred), patch.Put(draw.gauss(0, 1)), patch.Put(vector),
        patch.Scale(draw.choice((-1.5, 0.5))), patch.Add(vector, 2.0), patch.Remove(vector),
    ]  # fmt: skip
    if site.point == "attn.scores":  # where the smallest float stands, only these stay finite
        kinds = [patch.Swap(), patch.Zero(), patch.Noise(3, seed=2), patch.Put(0.25), patch.Scale(0.5)]
    return draw.choice(kinds)


def random_list(draw, local):
    found = []
    for _ in range(draw.choice((1, 1, 2, 3, 4))):
        site, width = random_site(draw, local)
        found.append(Intervention(site, random_change(draw, site, width)))
    return found


def by_head_and_by_group(interventions):
    """Whether keys or values of one layer are asked for in both ways, which no run can give."""
    layers = {}
    for one in interventions:
        if one.site.point in ("kv.k", "kv.v"):
            at = {(one.site.point, layer) for layer in one.site.layer or range(3)}
            layers.setdefault(one.site.by_query_head, set()).update(at)
    return bool(layers.get(True, set()) & layers.get(False, set()))


def paired_with(other, interventions):
    """The same with the other run named."""
    swap = patch.Swap(tuple(other))
    return [Intervention(one.site, swap if one.do == patch.Swap() else one.do) for one in interventions]


def agree(found, expected, what):
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    scale = max(1.0, float(expected.nan_to_num(0, 0, 0).abs().max()))
    assert torch.allclose(found, expected, rtol=0, atol=1e-9 * scale, equal_nan=True), (
        f"{what}: off by {float((found - expected).abs().max())}, of {scale}"
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_a_list_of_interventions_means_the_same_on_every_route(model_type, attention, seed):
    """run == evaluate == a generation's prefill, alone and padded == scheduled hooks == the cell of a sweep."""
    draw = random.Random(f"{model_type} {attention} {seed}")
    lens = small_lens(model_type, attention, torch.float64, seed=seed)
    local = sorted({point.local for point in lens.points()} | {"attn.result"})
    rows, others = prompts(draw)
    everywhere = bool(seed % 2)
    weights = WEIGHTS if everywhere else WEIGHTS[-1:]
    metric = patch.Metric("weighted", lambda logits, _: (logits * weights).sum((1, 2)), everywhere)
    measure = lambda logits: (logits[:, -len(weights) :] * weights).sum((1, 2))  # noqa: E731
    lists = []
    while len(lists) < LISTS:
        one = random_list(draw, local)
        mixed = by_head_and_by_group(one)
        if mixed:
            with pytest.raises(PatchError, match="both by query head and by group"):
                patch.run_with_interventions(lens, [rows[0]], paired_with(others[0], one))
            with pytest.raises(PatchError, match="both by query head and by group"):
                patch.evaluate(lens, rows, [one], metric, sources=others, allow=BOTH, progress=False)
            continue
        lists.append(one)
    together = patch.evaluate(lens, rows, lists, metric, sources=others, allow=BOTH, progress=False)
    for i, asked in enumerate(lists):
        said = "; ".join(map(str, asked))
        for j, (row, other) in enumerate(zip(rows, others, strict=True)):
            expected = patch.run_with_interventions(lens, [row], paired_with(other, asked), allow=BOTH)
            agree(together[i, j], measure(expected)[0], f"evaluate: {said}")
        one = paired_with(other, asked)
        named = patch.evaluate(lens, [row], [one], metric, allow=BOTH, progress=False)
        agree(named[0], measure(expected), f"evaluate alone: {said}")
        check_generation(lens, row, one, expected[0, -1], said)
        if not any(x.site.by_query_head for x in one):
            hooks = timeline.schedule_edits(lens, one, position_names={"end": LENGTH - 1})
            agree(lens.run_with_hooks(torch.tensor([row]), hooks), expected, f"scheduled: {said}")
        check_sweep(lens, row, other, asked[0], metric, measure)


def check_generation(lens, row, one, expected, said):
    if any(x.site.point == "logits" and x.do == patch.Apply(centred) for x in one):
        return  # a generation has no other logits than the last
    run = patch.generate_with_interventions(lens, [row], 1, one, allow=BOTH, names="logits", stop_ids=())
    agree(run.acts["logits"][0, -1], expected, f"generate: {said}")
    if not any(x.do.prompts for x in one):  # the others are as long as one row of a batch alone
        kept = row[2:] if all(set(x.site.pos or ("end",)) == {"end"} and not x.site.key for x in one) else row
        short = [*row, 5, 6, 7]
        run = patch.generate_with_interventions(lens, [short, kept], 1, one, allow=BOTH, names="logits", stop_ids=())
        alone = [patch.run_with_interventions(lens, [ids], one, allow=BOTH)[0, -1] for ids in (short, kept)]
        agree(run.acts["logits"][:, -1], torch.stack(alone), f"generate, padded: {said}")


def check_sweep(lens, row, other, one, metric, measure):
    site = one.site
    over = ("pos",) if site.point in ROOT_POINTS else ("layer", "pos")
    found = patch.sweep(
        lens, [row], [other], site, over=over, metric=metric, do=one.do, direction="noise", normalise=False,
        allow=BOTH, progress=False,
    )  # fmt: skip
    places = [site.at(**dict(zip(over, place, strict=True))) for place in product_of(site, over)]
    for i, (place, value) in enumerate(zip(places, found.raw.values.ravel(), strict=True)):
        if i % 7 == 0:
            logits = patch.run_with_interventions(
                lens, [row], paired_with(other, [Intervention(place, one.do)]), allow=BOTH
            )
            agree(value, measure(logits)[0], f"sweep: {place} <- {one.do}")


def product_of(site, over):
    sizes = {"layer": range(3), "pos": range(LENGTH)}
    return product(*(getattr(site, axis) or sizes[axis] for axis in over))


@pytest.mark.parametrize("point", ["resid_post", "ln_final.scale", "ln_final.normalized", "logits"])
def test_a_function_that_mixes_positions_sees_them_all_behind_the_last_layer_too(lens, point):
    row = [5, 17, 23, 42, 8, 60]
    where = {"layer": 2} if point == "resid_post" else {}
    for pos in (None, (1, 3, "end")):
        one = Intervention(Site(point, pos=pos, **where), patch.Apply(centred))
        found = patch.evaluate(lens, [row], [[one]], lambda logits: logits[:, 7], progress=False)
        agree_32(found[0], patch.run_with_interventions(lens, [row], one)[:, -1, 7])


def agree_32(found, expected):
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))


def test_noise_is_that_of_its_seed_point_and_position_wherever_it_is_drawn(lens):
    """The same numbers alone, in a padded batch, in pieces of a generation and in another dtype."""
    row, one = [5, 17, 23, 42, 8, 60], Intervention(Site("embed", pos=(2, 4)), patch.Noise(3, seed=5))

    def added(lens, tokens, **forward):
        seen = {}

        def look(x, point):
            seen[point.name] = x.clone()
            return x

        hooks = [
            ("embed", look),
            *timeline.schedule_edits(lens, one),
            ("embed", lambda x, p: seen.update(after=x) or x),
        ]
        lens.run_with_hooks(tokens, hooks, **forward)
        return (seen["after"] - seen["embed"]).double()

    alone = added(lens, torch.tensor([row]))[0]
    padded = added(lens, [row, row[:3]])
    torch.testing.assert_close(padded[0], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded[1, -1], alone[2], rtol=0, atol=1e-5)
    kv = lens.new_kv()
    lens(torch.tensor([row[:3]]), kv=kv)
    torch.testing.assert_close(added(lens, torch.tensor([row[3:]]), kv=kv)[0, 1], alone[4], rtol=0, atol=1e-5)
    exact = added(small_lens(lens.cfg.model_type, dtype=torch.float64), torch.tensor([row]))[0]
    torch.testing.assert_close(exact, alone, rtol=0, atol=1e-4)
    assert float(alone[2].std()) == pytest.approx(3 * float(lens.W_E.std()), rel=0.3)
    assert not torch.allclose(alone[2], alone[4])


def test_noise_between_queries_and_keys_is_the_same_however_many_keys_there_are(lens):
    row = [*range(10, 100)] * 2
    site = Site("attn.scores", layer=1, pos=130, key=(3, 70, 129))
    one = Intervention(site, patch.Noise(3, seed=1))
    seen = []
    for tokens in (row[:131], row):
        before, after = (
            lens.run_with_cache(torch.tensor([tokens]), "attn.scores", hooks)[1]["attn.scores", 1][0, :, 130]
            for hooks in (None, timeline.schedule_edits(lens, one))
        )
        seen.append((after - before)[:, [3, 70, 129]])
        assert ((after != before).nonzero()[:, 1].unique() == torch.tensor([3, 70, 129])).all()
    torch.testing.assert_close(*seen, rtol=0, atol=1e-4)
