"""Sweeps: every cell is what a whole run with one hook would have given, and less is run."""

import numpy as np
import pytest
import torch
from conftest import small_lens

import glmlens
from glmlens import patch
from glmlens.patch import PatchError, Site
from glmlens.patch.evaluate import EvaluationJob
from glmlens.patch.pairs import PromptPairs
from glmlens.recording.recorder import trace_points

POINTS = sorted({p.local for p in trace_points(small_lens("glm4").model).values()})
PAIR = (5, 9)


def pair(differ=(3, 6), length=9, seed=0):
    """Two prompts that differ at these positions."""
    clean = torch.randint(10, 101, (1, length), generator=torch.Generator().manual_seed(seed))
    corrupt = clean.clone()
    for p in differ:
        corrupt[0, p] = (clean[0, p] + 7) % 90 + 10
    return clean, corrupt


def index_of(axes, **where):
    return tuple(where.get(axis, slice(None)) for axis in axes)


def naive(lens, base, source, name, *places):
    """Logits of whole runs of the base, the source's value put in the place of each by an ordinary hook."""
    value = lens.run_with_cache(source, [name])[1][name]

    def put(x, point):
        for row, where in enumerate(places):
            x[row][index_of(point.axes[1:], **where)] = value[0][index_of(point.axes[1:], **where)]
        return x

    return lens.run_with_hooks(base.expand(len(places), -1), {name: put})


def position_axis(axes):
    return "query" if "query" in axes else "pos" if "pos" in axes else "key"


def agree(found, expected):
    """To 1e-5 of the largest logit; both are by place, what is expected as logits."""
    found, logits = torch.as_tensor(np.array(found)).flatten(), torch.cat([*expected])
    difference = logits[:, -1, PAIR[0]] - logits[:, -1, PAIR[1]]
    assert found.shape == difference.shape
    assert float((found - difference).abs().max()) <= 1e-5 * float(logits.abs().max())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("point", POINTS)
def test_a_sweep_equals_the_naive_loop_at_every_point(point, attention):
    lens = small_lens("glm4", attention)
    if point not in {p.local for p in lens.points()}:
        pytest.skip(f"{attention} has no {point}")
    clean, corrupt = pair()
    name = (
        "blocks.{}." + point if any(p.name.startswith("blocks.") for p in lens.points() if p.local == point) else point
    )
    layers = range(3) if name != point else [None]
    over = ("layer", "pos") if name != point else ("pos",)
    found = patch.sweep(
        lens, clean, corrupt, point, over=over, metric=PAIR, normalise=False, progress=False, allow="no change"
    )
    axes = next(p.axes for p in lens.points() if p.local == point)
    places = [{position_axis(axes): p} for p in range(9)]
    agree(found.values, [naive(lens, corrupt, clean, name.format(layer), *places) for layer in layers])


@pytest.mark.parametrize(
    ("point", "axis", "n"),
    [("attn.q", "head", 4), ("attn.z", "head", 4), ("attn.result", "head", 4), ("attn.q_rot", "head", 4),
     ("attn.k", "kv", 2), ("attn.v", "kv", 2), ("kv.k", "kv", 2), ("kv.v", "kv", 2), ("kv.k_new", "kv", 2),
     ("mlp.post", "mlp", 56), ("mlp.gate", "mlp", 56), ("attn.pattern", "head", 4),
     ("attn.scores", "head", 4), ("attn.z", "d", 16), ("resid_mid", "model", 48)],
)  # fmt: skip
def test_a_sweep_over_parts_equals_the_naive_loop(lens, point, axis, n):
    clean, corrupt = pair((0, 4))
    found = patch.sweep(
        lens,
        clean,
        corrupt,
        point,
        over=("layer", axis),
        metric=PAIR,
        normalise=False,
        progress=False,
        direction="noise",
    )
    places = [{axis: i} for i in range(n)]
    agree(found.values, [naive(lens, clean, corrupt, f"blocks.{layer}.{point}", *places) for layer in range(3)])


def test_the_angles_of_a_layer_can_be_changed_pair_by_pair(lens):
    clean, _ = pair()
    found = patch.sweep(lens, clean, None, Site("rotary.cos", layer=1), over=("pair",), metric=PAIR, normalise=False,
                        do=patch.Put(0.5), direction="noise", progress=False)  # fmt: skip

    def put(x, point):
        for i in range(4):
            x[i, :, i] = 0.5
        return x

    agree(found.values, [lens.run_with_hooks(clean.expand(4, -1), {"blocks.1.rotary.cos": put})])


def test_a_rotary_pair_is_two_adjacent_channels(lens):
    clean, corrupt = pair()
    found = patch.sweep(
        lens, clean, corrupt, Site("attn.q_rot", layer=1), over=("head", "pair"), metric=PAIR, normalise=False,
        progress=False,
    )  # fmt: skip
    places = [{"head": h, "rotated": slice(2 * i, 2 * i + 2)} for h in range(4) for i in range(4)]
    agree(found.values, [naive(lens, corrupt, clean, "blocks.1.attn.q_rot", *places)])


def test_a_pattern_is_changed_by_destination_and_source(lens):
    clean, corrupt = pair()
    found = patch.sweep(
        lens, clean, corrupt, Site("attn.pattern", layer=1, head=2), over=("query", "key"), metric=PAIR,
        normalise=False, progress=False, most_bytes=40_000,
    )  # fmt: skip
    places = [{"head": 2, "query": q, "key": k} for q in range(9) for k in range(9)]
    agree(found.values, [naive(lens, corrupt, clean, "blocks.1.attn.pattern", *places)])
    assert found.axes == ("query", "key")


@pytest.mark.parametrize("point", ["kv.k", "kv.v"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_keys_and_values_are_changed_per_query_head_as_if_ungrouped(point, attention):
    """The same as in a model whose every query head has keys and values of its own, with the same weights."""
    grouped, split = small_lens("glm", attention), small_lens("glm", attention, num_key_value_heads=4)
    weights = dict(grouped.model.named_parameters())
    with torch.no_grad():
        for name, p in split.model.named_parameters():
            w = weights[name]
            if ".key." in name or ".value." in name:
                w = w.unflatten(0, (2, 16)).repeat_interleave(2, 0).flatten(0, 1)
            p.copy_(w)
    clean, corrupt = pair()
    found = patch.sweep(
        grouped, clean, corrupt, point, over=("layer", "head"), metric=PAIR, normalise=False, progress=False
    )
    heads = [{"kv": h} for h in range(4)]
    expected = [naive(split, corrupt, clean, f"blocks.{layer}.{point}", *heads) for layer in range(3)]
    agree(found.values, expected)
    assert "query heads" in found.about["heads"]
    one = patch.Intervention(Site(point, layer=1, head=3), patch.Swap.of_prompt(grouped, clean))
    logits = patch.run_with_interventions(grouped, corrupt, one)
    torch.testing.assert_close(logits, expected[1][3:], rtol=0, atol=1e-5 * float(logits.abs().max()))


def test_groups_and_single_heads_can_be_changed_in_one_job(lens):
    clean, corrupt = pair()
    swap = patch.Swap()
    variants = [[patch.Intervention(Site("kv.k", layer=1, **where), swap)] for where in ({"kv": 1}, {"head": (2, 3)})]
    group, heads = patch.evaluate(lens, corrupt, variants, PAIR, sources=clean, progress=False)
    torch.testing.assert_close(group, heads, rtol=0, atol=1e-6)  # the two query heads are the group


@pytest.mark.parametrize("everywhere", [False, True])
def test_several_changes_at_several_layers_hold_together(lens, everywhere):
    clean, corrupt = pair()
    a = lens.run_with_cache(clean, "all")[1]

    def head(x, p):
        x[:, 4:, 1] = a[p.name][:, 4:, 1]
        return x

    def neurons(x, p):
        x[:, 2, 5:9] = 0
        return x

    def logits_of(hooks):
        return lens.run_with_hooks(corrupt, hooks)

    metric = patch.Metric("spread", lambda logits, _: logits.std((1, 2)), everywhere=everywhere)
    swap = patch.Intervention(Site("attn.z", layer=(0, 2), pos=range(4, 9), head=1), patch.Swap())
    zero = patch.Intervention(Site("mlp.post", layer=1, pos=2, mlp=range(5, 9)), patch.Zero())
    found = patch.evaluate(lens, corrupt, [[swap], [zero], [swap, zero]], metric, sources=clean, progress=False)
    at = {"blocks.0.attn.z": head, "blocks.2.attn.z": head}
    for row, hooks in zip(
        found, (at, {"blocks.1.mlp.post": neurons}, at | {"blocks.1.mlp.post": neurons}), strict=True
    ):
        logits = logits_of(hooks)
        expected = metric(logits if everywhere else logits[:, -1:], torch.zeros(1))
        assert abs(float(row[0]) - float(expected[0])) <= 1e-5 * float(logits.abs().max())


def test_the_result_does_not_depend_on_the_memory_budget(lens):
    clean, corrupt = pair((0, 5))
    grids = [
        patch.sweep(
            lens, clean, corrupt, "mlp_out", over=("layer", "pos"), metric=PAIR, progress=False, most_bytes=budget
        ).values
        for budget in (1, 300_000, 2**30)
    ]
    for grid in grids[1:]:
        np.testing.assert_allclose(grid, grids[0], rtol=0, atol=1e-5)


def test_positions_that_share_their_past_are_not_run(lens):
    clean, corrupt = pair((6,))
    found = patch.sweep(lens, clean, corrupt, "resid_pre", over=("layer", "pos"), metric=PAIR, progress=False)
    assert found.unchanged.values[0][:, :6].all()
    assert not found.unchanged.values[0][:, 6].any()
    assert (found.values[:, :6] == 0).all()
    assert found.cost.unchanged >= 18
    assert found.cost.cells + found.cost.unchanged == 27
    assert found.cost.flops < found.cost.naive_flops / 8


def test_check_says_what_a_sweep_will_take(lens):
    clean, corrupt = pair((2, 6))
    asked = {"over": ("layer", "pos"), "metric": PAIR}
    assert patch.check_sweep(lens, clean, corrupt, "attn_out", **asked) == (
        patch.sweep(lens, clean, corrupt, "attn_out", progress=False, **asked).cost
    )
    small = patch.check_sweep(lens, clean, corrupt, "attn_out", most_bytes=100_000, **asked)
    assert small.bytes <= 100_000
    assert small.batches > 1


def test_both_directions_and_what_they_divide_by(lens):
    clean, corrupt = pair()
    found = patch.sweep(lens, clean, corrupt, "resid_pre", over=("layer", "pos"), metric=PAIR, direction="both",
                        progress=False)  # fmt: skip
    assert found.axes == ("direction", "layer", "pos")
    difference = {
        name: float(lens(p)[0, -1, 5] - lens(p)[0, -1, 9]) for name, p in (("clean", clean), ("corrupt", corrupt))
    }
    assert found.clean[0] == pytest.approx(difference["clean"], abs=1e-5)
    assert found.corrupt[0] == pytest.approx(difference["corrupt"], abs=1e-5)
    raw = found.raw.at(pair=0, direction="noise").values
    span = found.corrupt[0] - found.clean[0]
    np.testing.assert_allclose(found.at(direction="noise").values, (raw - found.clean[0]) / span, atol=1e-6)
    everything = patch.sweep(lens, clean, corrupt, "embed", over=(), metric=PAIR, direction="both", progress=False)
    np.testing.assert_allclose(everything.values, [1, 1], atol=1e-5)  # all of the other run


def test_baselines_that_are_too_close_are_an_error(lens):
    clean, _ = pair()
    with pytest.raises(PatchError, match="too close to divide by"):
        patch.sweep(lens, clean, clean, "resid_pre", over=("layer",), metric=PAIR, progress=False)


def test_unequal_lengths_are_shown_token_by_token():
    lens = glmlens.load()
    with pytest.raises(PatchError) as caught:
        patch.sweep(lens, "Mary gave it to", "Mary gave the book to", "resid_pre", over=("layer",), metric=(5, 6))
    first, second = str(caught.value).splitlines()[-2:]
    assert "Mary" in first
    assert "Mary" in second
    assert first.index("gave") == second.index("gave")
    assert "differ from token" in str(caught.value)


def test_many_pairs_are_measured_each_and_together(lens):
    pairs = [pair((2, 5), seed=i) for i in range(5)] + [pair((3,), length=7, seed=9)]
    clean, corrupt = ([p[i][0].tolist() for p in pairs] for i in (0, 1))
    with pytest.raises(PatchError, match="several lengths"):
        patch.sweep(lens, clean, corrupt, "resid_pre", over=("layer", "pos"), metric=PAIR, progress=False)
    asked = {"over": ("layer", "head"), "metric": PAIR, "progress": False, "normalise": False}
    found = patch.sweep(lens, clean, corrupt, "attn.z", **asked)
    assert found.raw.shape == (6, 3, 4)
    for i, (one, other) in enumerate(pairs):
        alone = patch.sweep(lens, one, other, "attn.z", **asked)
        np.testing.assert_allclose(found.raw.values[i], alone.values, atol=2e-5)
    np.testing.assert_allclose(found.values, found.raw.values.mean(0))
    assert (found.low.values <= found.values).all()
    assert (found.values <= found.high.values).all()


def test_the_interval_is_the_bootstrap_of_the_ratio_of_means(lens):
    pairs = [pair((2, 5), seed=i) for i in range(4)]
    clean, corrupt = (torch.cat([p[i] for p in pairs]) for i in (0, 1))
    found = patch.sweep(
        lens, clean, corrupt, Site("attn_out", layer=1), over=("pos",), metric=PAIR, progress=False, seed=3
    )
    drawn = np.random.default_rng(3).integers(0, 4, (1000, 4))
    raw = found.raw.values[:, 5]
    means = [(raw[d].mean() - found.corrupt[d].mean()) / (found.clean - found.corrupt)[d].mean() for d in drawn]
    assert found.low.at(pos=5) == pytest.approx(np.quantile(means, 0.025))
    assert found.high.at(pos=5) == pytest.approx(np.quantile(means, 0.975))


def test_the_null_floor_takes_values_from_other_pairs(lens):
    pairs = [pair((2, 5), seed=i) for i in range(4)]
    clean, corrupt = (torch.cat([p[i] for p in pairs]) for i in (0, 1))
    asked = {"over": ("layer",), "metric": PAIR, "progress": False, "normalise": False}
    found = patch.sweep(lens, clean, corrupt, "attn_out", null=2, seed=1, **asked)
    assert found.floor.shape == (3,)
    assert not np.isnan(found.floor.values).any()
    draw, effects = np.random.default_rng(1), []
    for _ in range(2):
        ring = draw.permutation(4)
        source = dict(zip(ring.tolist(), np.roll(ring, 1).tolist(), strict=True))
        assert all(i != j for i, j in source.items())
        values = [
            naive(lens, corrupt[i : i + 1], clean[source[i] : source[i] + 1], "blocks.1.attn_out", {}) for i in range(4)
        ]
        effects.append(abs(np.mean([float(v[0, -1, 5] - v[0, -1, 9]) for v in values])))
    assert found.floor.at(layer=1) == pytest.approx(np.quantile(effects, 0.95), abs=1e-4)
    with pytest.raises(PatchError, match="exchanges sources"):
        patch.sweep(lens, clean[:1], corrupt[:1], "attn_out", null=1, **asked)


def test_a_task_brings_its_metric_and_its_positions():
    lens = glmlens.load()
    examples = glmlens.tasks.ioi.examples(lens, 6)
    found = patch.sweep(lens, examples, "flip", Site("resid_pre", pos=("IO", "S2", "end")), over=("layer", "pos"),
                        progress=False)  # fmt: skip
    assert found.labels["pos"] == ["IO", "S2", "end"]
    assert found.raw.shape == (6, lens.cfg.n_layers, 3)
    for i, example in enumerate(examples):
        clean, corrupt = (torch.tensor([t]) for t in (example.tokens, example.counterfactuals["flip"]))
        assert found.clean[i] == pytest.approx(float(examples[i : i + 1].measure(lens(clean))), abs=1e-4)
        logits = naive(lens, corrupt, clean, "blocks.1.resid_pre", {"pos": example.at("S2")})
        expected = float(examples[i : i + 1].measure(logits))
        assert found.raw.at(pair=i, layer=1, pos="S2") == pytest.approx(expected, abs=1e-5 * float(logits.abs().max()))


def test_evaluate_takes_from_a_task_what_a_sweep_takes():
    lens = glmlens.load()
    examples = glmlens.tasks.ioi.examples(lens, 4)
    site = Site("resid_pre", layer=1, pos="S2")
    swept = patch.sweep(lens, examples, "flip", site, over=("layer",), direction="noise", progress=False)
    variant = [[patch.Intervention(site, patch.Swap())]]
    short = patch.evaluate(lens, examples, variant, sources="flip", progress=False)
    spelt = patch.evaluate(
        lens, examples.tokens, variant, examples, sources=examples.counterfactual("flip"),
        position_names=[example.positions for example in examples], progress=False,
    )  # fmt: skip
    assert torch.equal(short, spelt)
    np.testing.assert_allclose(short[0], swept.raw.values[:, 0], rtol=0, atol=1e-5)
    answers = [(example.correct, example.wrong) for example in examples]
    for metric in (examples, examples.measure, patch.Metric.of_answers(lens, answers)):
        found = patch.evaluate(lens, examples, variant, metric, sources="flip", progress=False)
        np.testing.assert_allclose(found, short, rtol=0, atol=1e-5)


class Stop:
    """A metric that is interrupted at its n-th call."""

    def __init__(self, n):
        self.left = n

    def __call__(self, logits):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return logits[:, 5] - logits[:, 9]


def test_an_interrupted_sweep_returns_what_is_finished_and_goes_on_from_disk(lens, tmp_path):
    clean, corrupt = pair((0,))
    whole = patch.sweep(lens, clean, corrupt, "mlp_out", over=("layer", "pos"), metric=Stop(-1), progress=False)
    asked = {"over": ("layer", "pos"), "progress": False, "most_bytes": 1, "checkpoint": tmp_path / "cells.safetensors"}
    metric = patch.Metric("Stop", lambda logits, _: stop(logits[:, -1]), key="5 - 9")  # it counts: its state changes
    stop = Stop(10)
    part = patch.sweep(lens, clean, corrupt, "mlp_out", metric=metric, **asked)
    assert not part.finished
    done = ~np.isnan(part.values)
    assert 0 < done.sum() < 27
    np.testing.assert_allclose(part.values[done], whole.values[done], atol=1e-5)
    stop = Stop(-1)
    rest = patch.sweep(lens, clean, corrupt, "mlp_out", metric=metric, **asked)
    assert rest.finished
    assert rest.cost.cells == 27 - done.sum()
    np.testing.assert_allclose(rest.values, whole.values, atol=1e-5)
    with pytest.raises(PatchError, match="another sweep"):
        patch.sweep(lens, clean, corrupt, "attn_out", metric=metric, **asked)


def tripled(x):
    return x * 3


def test_a_checkpoint_gives_no_cells_of_another_sweep(lens, tmp_path):
    """Other answers, functions of the same name, changes and models are refused; another null runs its own cells."""
    clean, corrupt = (torch.cat(rows) for rows in zip(*(pair((0, 4), seed=i) for i in range(5)), strict=True))
    answers = lambda right, wrong: lambda logits: logits[:, right] - logits[:, wrong]  # noqa: E731

    def swept(path, lens=lens, **changes):
        asked = {"metric": (5, 9), "null": 2, "seed": 0, "normalise": False, "direction": "noise"} | changes
        site = asked.pop("site", "mlp_out")
        return patch.sweep(lens, clean, corrupt, site, over=("layer",), checkpoint=path, progress=False, **asked)

    def fresh(**changes):
        return swept(None, **changes)

    cases = [
        ({}, {"metric": (5, 8)}, "metric"),
        ({"metric": lambda logits: logits[:, 5]}, {"metric": lambda logits: logits[:, 6]}, "metric"),
        ({"metric": answers(5, 6)}, {"metric": answers(5, 7)}, "metric"),
        ({"do": patch.Apply(lambda x: x * 2), "null": 0}, {"do": patch.Apply(lambda x: x * 3), "null": 0}, "change"),
        ({"do": patch.Noise(3, seed=1), "null": 0}, {"do": patch.Noise(3, seed=2), "null": 0}, "change"),
        ({"do": patch.Apply(tripled), "null": 0}, {"do": patch.Apply(tripled, key="v2"), "null": 0}, "change"),
        ({}, {"site": "attn_out"}, "places"),
        ({}, {"lens": small_lens(seed=3)}, "model"),
    ]
    for i, (first, second, what) in enumerate(cases):
        path = tmp_path / f"{i}.npz"
        done = swept(path, **first)
        again = swept(path, **first)
        assert again.cost.cells == 0
        np.testing.assert_array_equal(again.raw.values, done.raw.values)
        with pytest.raises(PatchError, match=rf"another sweep, with other [a-z ]*{what}.*give another file"):
            swept(path, **second)
    swept(tmp_path / "null.npz")
    other = swept(tmp_path / "null.npz", seed=5)
    np.testing.assert_allclose(other.floor.values, fresh(seed=5).floor.values, atol=1e-5)
    assert not np.allclose(other.floor.values, fresh().floor.values, atol=1e-5)
    assert swept(tmp_path / "null.npz").cost.cells == 0


def test_a_checkpoint_needs_functions_that_can_be_told_apart(lens, tmp_path):
    clean, corrupt = pair((0,))
    asked = {"over": ("layer",), "checkpoint": tmp_path / "cells.npz", "progress": False}
    draw = torch.Generator().manual_seed(0)
    metric = lambda logits: logits[:, 5] + torch.rand(len(logits), generator=draw)  # noqa: E731
    with pytest.raises(PatchError, match=r"no key.*Generator.*Metric\('<lambda>', of, key='...'\)"):
        patch.sweep(lens, clean, corrupt, "mlp_out", metric=metric, **asked)
    do = patch.Apply(lambda x: x + torch.rand((), generator=draw))
    with pytest.raises(PatchError, match=r"no key.*Apply\(<lambda>, key='...'\)"):
        patch.sweep(lens, clean, corrupt, "mlp_out", metric=(5, 9), do=do, **asked)
    assert not (tmp_path / "cells.npz").exists()
    named = patch.Metric("noisy", lambda logits, _: metric(logits[:, -1]), key="noisy, seed 0")
    assert patch.sweep(lens, clean, corrupt, "mlp_out", metric=named, **asked).finished


def test_a_checkpoint_of_an_older_version_is_of_another_sweep(lens, tmp_path):
    clean, corrupt = pair((0,))
    with (tmp_path / "cells.npz").open("wb") as file:
        np.savez(file, key=np.array("ab" * 32), denoise=np.zeros((3, 1)), **{"denoise moved": np.ones((3, 1), bool)})
    with pytest.raises(PatchError, match=r"not a whole safetensors file.*give another file"):
        patch.sweep(lens, clean, corrupt, "mlp_out", over=("layer",), metric=(5, 9), checkpoint=tmp_path / "cells.npz")


def test_what_cannot_be_swept_is_said_at_once(lens):
    clean, corrupt = pair()
    for site, over, said in (
        ("resid_pre", ("head",), "resid_pre has layer, pos, batch|resid_pre has layer, pos"),
        ("resid_pre2", ("layer",), "resid_pre"),
        (Site("attn.k", head=1), ("layer",), "Heads share it"),
        (Site("attn.z", layer=7), ("head",), "layer 7 asked for; there are 3"),
        (Site("attn.z", pos=40), ("head",), "position 40 asked for"),
        (Site("attn.z", pos="S2"), ("head",), "no position 'S2'"),
    ):
        with pytest.raises(PatchError, match=said):
            patch.sweep(lens, clean, corrupt, site, over=over, metric=PAIR, progress=False)
    with pytest.raises(PatchError, match="counted from 0"):
        Site("attn.z", pos=-1)
    with pytest.raises(PatchError, match="no metric"):
        patch.sweep(lens, clean, corrupt, "attn.z", over=("head",), progress=False)


def test_a_sweep_that_changes_nothing_is_an_error(lens):
    clean, corrupt = pair((6,))
    asked = {"over": ("layer",), "metric": PAIR, "progress": False}
    with pytest.raises(PatchError, match="changed nothing"):
        patch.sweep(lens, clean, corrupt, Site("resid_pre", pos=2), **asked)
    found = patch.sweep(lens, clean, corrupt, Site("resid_pre", pos=2), allow="no change", **asked)
    assert (found.values == 0).all()


def test_a_cell_starts_at_its_layer_and_position(lens):
    """What a job runs is counted by the positions that pass each layer."""
    clean, corrupt = pair((0,))
    passed = []
    for i, block in enumerate(lens.model.blocks):
        block.register_forward_hook(lambda m, args, out, i=i: passed.append((i, args[0].shape[0] * args[0].shape[1])))
    rows = [tuple(p[0].tolist()) for p in (corrupt, clean)]
    metric = patch.Metric("first", lambda logits, _: logits[:, -1, 0])
    job = EvaluationJob(PromptPairs.build(lens, [rows[0]], [rows[1]], metric))
    variants = [[patch.Intervention(Site("resid_pre", layer=2, pos=p), patch.Swap())] for p in range(9)]
    todo = torch.ones(9, 1, dtype=torch.bool)
    list(job.run_variants(variants, todo))
    by_layer = [sum(n for layer, n in passed if layer == i) for i in range(3)]
    assert by_layer == [18, 18, 18 + 45]  # the two runs, and a triangle
