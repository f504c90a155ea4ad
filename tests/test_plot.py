"""Figures: what is drawn is what was given, and a token is never markup or a coordinate."""

import json
import re
from dataclasses import replace
from html import escape
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_lens
from hostile import HOSTILE

import glmlens
from glmlens import analysis, circuits, patch, plot, timeline
from glmlens.lens.sampling import GenerationStep
from glmlens.plot.style import show_control_characters
from glmlens.results import Labelled

N = len(HOSTILE)
EYE = np.eye(N, dtype=np.float32)


@pytest.fixture(scope="module")
def model():
    return small_lens()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 101, (1, N), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def read(model, ids):
    """A logit lens whose positions and words are hostile."""
    result = analysis.logit_lens(model, ids, target=7)
    pos = [f"{i} {t}" for i, t in enumerate(HOSTILE)]
    named = {}
    for name, sheet in result.sheets().items():
        values = np.resize(np.array(HOSTILE), sheet.shape) if name == "word" else sheet.values
        named[name] = Labelled(values, sheet.axes, {**sheet.labels, "pos": pos}, {**result.about, "prompt": HOSTILE[0]})
    return analysis.LogitLens(result.about, **named)


def sweep_of(values, spread=None, about=None):
    """A Sweep with these effects and an interval of a width, as a sweep leaves it."""
    values = np.asarray(values, np.float32)
    axes = ("layer", "pos")[: values.ndim]
    whole = [Labelled(x, axes, {}, about or {}) for x in (values, values - 0.1, values + 0.1, values * np.nan)]
    if spread is None:
        whole[1] = whole[2] = whole[3]
    rest = {"raw": whole[0], "unchanged": whole[0], "clean": np.ones(1), "corrupt": np.zeros(1)}
    cost = patch.Cost(0, 0, 0, 0, 0, 0)
    return patch.Sweep(values, axes, {}, about or {}, low=whole[1], high=whole[2], floor=whole[3], cost=cost, **rest)


def steps(n=4, vocab=N):
    logits = torch.randn(n, 1, vocab, generator=torch.Generator().manual_seed(0))
    return [GenerationStep(i, logits[i].argmax(-1), logits[i], torch.tensor([True])) for i in range(n)]


def hostile(result, *axes):
    """A result whose places along these axes, and whose prompt, are hostile."""
    changed = {}
    for name, sheet in result.sheets().items():
        labels = {axis: [HOSTILE[i % N] for i in range(len(sheet.labels[axis]))] for axis in axes if axis in sheet.axes}
        about = {**sheet.about, "prompt": HOSTILE[0], "direction": HOSTILE[3]}
        changed[name] = Labelled(sheet.values, sheet.axes, {**sheet.labels, **labels}, about)
    return replace(result, **changed)


def of_entries(model, ids):
    """The figures of a cache."""
    reads = hostile(analysis.cache_reads(model, ids, 5), "key")
    left = hostile(analysis.leave_one_out(model, ids, 5, positions=[2, 3]), "key")
    whole = hostile(analysis.leave_one_out(model, ids, 5, by="position"), "key")
    drop = hostile(analysis.eviction_curve(model, ids, counts=[0, 1, 3]), "entry")
    kv = model.new_kv()
    model(ids, kv=kv)
    return {
        "cache_norms": plot.cache_norms(kv, HOSTILE),
        "who_reads": plot.cache_reads(reads),
        "who_reads_layer": plot.cache_reads(reads, "direct", layer=1),
        "left_out": plot.leave_one_out(left),
        "left_out_position": plot.leave_one_out(whole, "logit"),
        "eviction": plot.eviction({HOSTILE[0]: drop}),
    }


def of_rotary(model, ids):
    """The figures of rotary positions."""
    parts = hostile(analysis.score_parts(model, ids, 1, 2), "query", "key")
    broken = patch.rotary.breakage(model, ids, {HOSTILE[1]: patch.rotary.freeze(model)})
    return {
        "score_by_pair": plot.score_by_pair(parts),
        "rotary_angles": plot.rotary_angles(parts),
        "rotary_patterns": plot.rotary_patterns(parts),
        "attention_by_distance": plot.attention_by_distance(hostile(analysis.distance_profile(model, ids), "head"), 1),
        "breakage": plot.breakage(broken),
    }


@pytest.fixture(scope="module")
def figures(model, ids, read):
    """Every view of hostile text by name."""
    labels = dict.fromkeys(("row", "column", "part", "series", "place", "layer"), HOSTILE)
    text = " ".join(HOSTILE)
    stream = analysis.accumulated_residual(model, ids)
    attribution = analysis.logit_attribution(model, ids, 5, 7, by="source")
    names = [(f"0.head{i}", f"{i + 1}.mlp") for i in range(3)]
    return {
        "heatmap": plot.heatmap(EYE, dict.fromkeys(("row", "column"), HOSTILE), title=text, subtitle=text, what=text),
        "patch_grid": plot.patch_grid(EYE, {"layer": HOSTILE, "pos": HOSTILE}, title=text),
        "logit_lens": plot.logit_lens(read),
        "logit_lens_kl": plot.logit_lens(read, "kl"),
        "attention_pattern": plot.attention_pattern(EYE, HOSTILE, title=text),
        "attention_by_value": plot.attention_pattern(EYE, HOSTILE, value_norms=np.ones(N)),
        "attention_heads": plot.attention_heads(np.stack([EYE] * 4), HOSTILE, n_kv_heads=2),
        "head_scores": plot.head_scores(EYE[:3, :4], n_kv_heads=2),
        "residual_norms": plot.residual_norms(stream),
        "residual_angles": plot.residual_angles(stream),
        "logit_attribution": plot.logit_attribution(attribution),
        "bars": plot.bars(np.arange(N), {"part": HOSTILE}, what=text),
        "lines": plot.lines(EYE, dict.fromkeys(("series", "place"), HOSTILE), what=text),
        "compare": plot.compare({text: sweep_of([1, 2], 1), "b": sweep_of([3, 4], 1)}, what=text),
        "compare_grids": plot.compare({text: sweep_of(EYE), "b": sweep_of(EYE)}),
        "generation": plot.generation(steps(), HOSTILE.__getitem__),
        "circuit": plot.circuit([(edge, 0.5) for edge in names]),
        **of_entries(model, ids),
        **of_rotary(model, ids),
    } | {"labels": plot.heatmap(Labelled(EYE, ("row", "column"), {"row": labels["row"]}))}


def strings(x, key=""):
    """Every text of a figure that Plotly reads as markup."""
    if isinstance(x, dict):
        for name, value in x.items():
            if name not in ("bdata", "dtype", "template"):
                yield from strings(value, name)
    elif isinstance(x, list):
        for value in x:
            yield from strings(value, key)
    elif isinstance(x, str):
        yield x


def test_every_token_is_shown_as_it_is_in_every_figure(figures):
    for name, figure in figures.items():
        for text in strings(json.loads(figure.to_json())):
            left = re.sub(r"<br>|<extra>|</extra>|%\{[^}]*\}", "", text)
            assert not re.search(r"[<>$\n\ud800-\udfff\u202e]|&(?!(amp|lt|gt|#36|#37);)", left), (name, text)


def test_a_token_is_never_a_coordinate(figures):
    for name, figure in figures.items():
        for trace in figure.data:
            for axis in (trace.x, trace.y):
                kinds = {type(v) for v in np.asarray(axis if axis is not None else [], dtype=object).ravel().tolist()}
                assert not any(issubclass(kind, str) for kind in kinds), name


def test_a_repeated_token_keeps_its_own_column():
    figure = plot.attention_pattern(np.eye(3), ["the", "cat", "the"])
    assert list(figure.data[0].x) == [0, 1, 2]
    assert list(figure.layout.xaxis.ticktext) == ["0 the", "1 cat", "2 the"]


def test_every_hover_says_a_number(figures):
    for name, figure in figures.items():
        for trace in figure.data:
            if trace.hoverinfo != "skip" and "text" not in (trace.to_plotly_json().get("mode") or ""):  # names of parts
                assert re.search(r"%\{(z|y|x|customdata)", trace.hovertemplate), name


def test_nothing_is_offered_for_upload_and_figures_are_transparent(figures):
    for figure in figures.values():
        look = figure.layout.template.layout
        assert "sendChartToCloud" in look.modebar.remove
        assert look.paper_bgcolor == look.plot_bgcolor == "rgba(0,0,0,0)"


def test_figures_are_small(figures):
    for name, figure in figures.items():
        assert len(figure.to_json()) < 25_000, name


def test_results_say_their_prompt_metric_and_model_in_the_title(model, ids):
    figure = plot.logit_lens(analysis.logit_lens(model, ids), "kl")
    assert "KL(" in figure.layout.title.text
    assert model.model_hash in figure.layout.title.subtitle.text
    assert "⟨" in figure.layout.title.subtitle.text  # the prompt, by ids


def test_a_title_can_be_given():
    figure = plot.heatmap(EYE, title="mine", subtitle="below", height=300, width=500)
    assert (figure.layout.title.text, figure.layout.title.subtitle.text, figure.layout.width) == ("mine", "below", 500)


def test_a_misspelt_keyword_is_an_error():
    for draw in (plot.heatmap, plot.attention_pattern, plot.lines, plot.patch_grid):
        with pytest.raises(TypeError):
            draw(EYE, titel="x")


def test_a_figure_has_no_side_effect():
    x = np.eye(600, dtype=np.float32)
    plot.attention_pattern(x)
    assert np.array_equal(x, np.eye(600, dtype=np.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_tensors_of_every_dtype_are_drawn(dtype):
    x = torch.eye(3).to(dtype)
    x = x.requires_grad_() if dtype.is_floating_point else x
    assert np.array_equal(plot.heatmap(x).data[0].z, np.eye(3))


def test_numbers_with_another_count_of_axes_are_an_error():
    with pytest.raises(ValueError, match=r"expected query key, got 3 axes.*data.at"):
        plot.attention_pattern(np.zeros((2, 3, 3)))


# Size.


def test_a_lone_peak_of_a_long_pattern_stays_and_the_figure_says_that_it_is_in_blocks():
    x = np.zeros((4096, 4096), np.float32)
    x[3000, 17], x[4095, 4095] = 0.7, -0.9
    figure = plot.attention_pattern(x)
    assert figure.data[0].z.shape == (256, 256)
    assert figure.data[0].z[187, 1] == np.float32(0.7)
    assert figure.data[0].z[255, 255] == np.float32(-0.9)
    assert "16 x 16" in figure.layout.title.subtitle.text
    assert "4,096 x 4,096" in figure.layout.title.subtitle.text
    assert figure.layout.xaxis.ticktext[1] == "16 … 31"
    assert len(figure.to_json()) < 400_000


def test_a_size_that_is_no_multiple_of_the_block_is_drawn_whole():
    x = np.arange(101 * 7, dtype=np.float32).reshape(101, 7)
    figure = plot.heatmap(x, max_cells=50)
    assert figure.data[0].z.shape == (34, 7)
    assert figure.data[0].z[-1, -1] == x[-1, -1]


def test_what_fits_is_drawn_cell_by_cell():
    figure = plot.heatmap(np.random.default_rng(0).random((256, 3)))
    assert figure.data[0].z.shape == (256, 3)
    assert not figure.layout.title.subtitle.text


def test_places_that_are_nowhere_known_stay_empty():
    x = np.full((300, 300), np.nan, np.float32)
    x[:2, :2] = 1
    z = plot.heatmap(x, max_cells=100).data[0].z
    assert z[0, 0] == 1
    assert np.isnan(z).sum() == z.size - 1


def test_every_place_of_many_has_its_label_on_hover():
    figure = plot.heatmap(np.zeros((100, 2)), {"row": [f"r{i}" for i in range(100)]})
    assert len(figure.layout.yaxis.ticktext) == 100
    assert len(figure.layout.yaxis2.ticktext) < 40
    assert figure.layout.yaxis2.matches == "y"


@pytest.mark.parametrize(
    ("most", "text"), [(250, "250"), (25, "25.0"), (2.5, "2.50"), (0.25, "0.25"), (0.00025, "0.00025")]
)
def test_what_is_written_in_cells_has_as_many_digits_as_the_largest_number_needs(most, text):
    assert plot.heatmap([[most, 0]]).data[1].text[0] == text


# Views.


def test_the_logit_lens_has_a_row_per_layer_and_the_best_tokens_on_hover(read):
    figure = plot.logit_lens(read)
    assert figure.data[0].z.shape == (4, N)
    assert np.allclose(figure.data[0].z, read.probability.values[..., 0])
    assert figure.data[0].customdata[0, 0].count("%") == 5
    with pytest.raises(ValueError, match="show is 'kld'"):
        plot.logit_lens(read, "kld")


def test_of_a_long_prompt_the_logit_lens_draws_every_so_many_positions(read):
    figure = plot.logit_lens(read, "kl", max_cells=5)
    assert np.allclose(figure.data[0].z, read.kl.values[:, ::3])
    assert f"one position of every 3 is drawn, of {N}" in figure.layout.title.subtitle.text


def test_one_of_several_prompts_is_drawn(model):
    result = analysis.logit_lens(model, torch.randint(2, 101, (3, 5)))
    assert np.allclose(plot.logit_lens(result, "kl", prompt=1).data[0].z, result.kl.values[1])


def test_a_patch_grid_has_zero_in_the_middle_and_its_interval_on_hover():
    grid = sweep_of([[0.2, -3.0]], spread=0.1, about={"metric": "logit difference", "model": "abc"})
    heat = plot.patch_grid(grid).data[0]
    assert (heat.zmin, heat.zmax) == (-3, 3)
    assert np.allclose(heat.customdata, [[[0.1, 0.3], [-3.1, -2.9]]])
    assert "95 % interval %{customdata[0]:.3g} to %{customdata[1]:.3g}" in heat.hovertemplate
    assert "null" not in heat.hovertemplate  # there is none
    assert "interval" not in plot.patch_grid(sweep_of([[1.0, 2.0]])).data[0].hovertemplate


def test_value_weighted_attention_multiplies_by_the_length_of_the_value():
    figure = plot.attention_pattern(np.ones((2, 2)), value_norms=torch.tensor([1.0, 3.0]))
    assert np.array_equal(figure.data[0].z, [[1, 3], [1, 3]])


@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (32, 2), (6, 1), (6, 6), (12, 3)])
def test_every_head_is_drawn_once_with_its_group(heads, groups):
    patterns = np.arange(1, heads + 1, dtype=np.float32)[:, None, None] * np.ones((heads, 5, 5), np.float32)
    figure = plot.attention_heads(patterns, n_kv_heads=groups)
    z, of = figure.data[0].z, figure.data[0].customdata
    for head in range(heads):
        assert (z == head + 1).sum() == 25
        assert (of[z == head + 1] == head).all()
    texts = [a.text for a in figure.layout.annotations]
    size = heads // groups
    assert texts == [f"head {h}" + (f" · kv {h // size}" if groups > 1 else "") for h in range(heads)]


def test_head_scores_part_the_groups_and_name_the_chance():
    model = small_lens()
    figure = plot.head_scores(
        analysis.head_scores(model, rows=1, length=5, words=range(2, 90)), "previous", n_kv_heads=2
    )
    assert [line.x0 for line in figure.layout.shapes] == [1.5]
    assert "by chance 0." in figure.layout.title.subtitle.text


def test_residual_norms_and_angles_are_those_of_the_vectors():
    stream = np.array([[[1, 0], [0, 2]], [[0, 3], [0, 5]], [[0, -3], [4, 4]]], np.float32)
    assert np.allclose(plot.residual_norms(stream).data[0].z, np.linalg.norm(stream, axis=-1))
    assert np.allclose(plot.residual_angles(stream).data[0].z, [[90, 0], [180, 45]], atol=0.05)


@pytest.mark.parametrize("by", ["layer", "component", "head", "mlp", "neuron", "source"])
def test_the_bars_of_an_attribution_sum_to_the_logit(model, ids, by):
    result = analysis.logit_attribution(model, ids, 5, 7, by=by)
    bars = plot.logit_attribution(result, top=9).data[0]
    assert len(bars.x) <= 10
    assert np.isclose(float(np.sum(bars.x)), float(result.total - result.unexplained), atol=1e-3)


def test_sources_are_summed_by_position(model, ids):
    result = analysis.logit_attribution(model, ids, 5, by="source")
    figure = plot.logit_attribution(result, over="key")
    assert len(figure.data[0].x) == N + len(result.rest.labels["part"])
    assert np.allclose(figure.data[0].x[1 : N + 1], result.values.sum((0, 1)), atol=1e-5)
    with pytest.raises(ValueError, match="this result has layer, head, key"):
        plot.logit_attribution(result, over="pos")


def test_lines_go_along_either_axis():
    x = Labelled(np.arange(6, dtype=np.float32).reshape(2, 3), ("layer", "part"), {"part": ["a", "b", "c"]})
    assert [trace.name for trace in plot.lines(x).data] == ["0", "1"]
    figure = plot.lines(x, along="layer")
    assert [trace.name for trace in figure.data] == ["a", "b", "c"]
    assert np.array_equal(figure.data[1].y, [1, 4])
    assert len(plot.lines([1.0, 2.0, 3.0]).data) == 1


def test_sweeps_of_other_places_are_not_compared():
    with pytest.raises(ValueError, match="has other axes or labels than"):
        plot.compare({"a": sweep_of([1, 2]), "b": sweep_of([1, 2, 3])})


def test_compared_grids_have_one_scale_of_colours():
    figure = plot.compare({"a": sweep_of([[1, 2]]), "b": sweep_of([[-5, 0]])})
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-5, 5)


def test_a_generation_has_a_frame_for_every_step():
    figure = plot.generation(steps(6), HOSTILE.__getitem__, top=3)
    assert [frame.name for frame in figure.frames] == [step.args[0][0] for step in figure.layout.sliders[0].steps]
    first = steps(6)[2].logits[0].double().softmax(-1)
    assert np.isclose(figure.data[0].y[2], float(first.max()))
    assert np.isclose(figure.data[1].y[2], float(-(first * first.log()).sum()))
    assert np.allclose(figure.frames[2].data[1].x, first.topk(3).values)


def test_a_circuit_draws_the_strongest_edges():
    graph = circuits.Graph(2, 2, 1)
    scores = torch.linspace(-1, 2, graph.mask.numel()).reshape(graph.mask.shape) * graph.mask
    figure = plot.circuit(circuits.EdgeScores(graph, scores, 0.0, {"sign": "up"}), top=4)
    assert sum(trace.mode == "lines" and trace.opacity is not None for trace in figure.data) == 4
    best = circuits.EdgeScores(graph, scores, 0.0, {}).top(1)[0]
    assert any(f"score {best[1]:+.4g}" in text for trace in figure.data for text in (trace.customdata or ()))


# Rotary positions.


def test_what_the_pairs_add_to_a_score_sums_to_the_score(model, ids):
    parts = analysis.score_parts(model, ids, 1, 2)
    z = plot.score_by_pair(parts, 6).data[0].z
    assert np.allclose(z.sum(0)[:7], parts.score.values[6, :7], atol=1e-4)
    assert np.isnan(z[:, 7:]).all()


def test_angles_are_drawn_within_one_turn_and_their_ends_have_one_colour(model, ids):
    parts = analysis.score_parts(model, ids, 1, 2)
    heat = plot.rotary_angles(parts).data[0]
    assert np.allclose(np.exp(1j * heat.z), np.exp(1j * parts.angle.values[-1].T), atol=1e-5)
    assert (heat.zmin, heat.zmax) == (np.float64(-np.pi), np.float64(np.pi))
    assert heat.colorscale[0][1] == heat.colorscale[-1][1]


def test_content_and_position_are_drawn_beside_the_pattern_itself(model, ids):
    parts = analysis.score_parts(model, ids, 1, 2)
    drawn = [trace.z for trace in plot.rotary_patterns(parts).data]
    sheets = (parts.pattern, parts.rotary_alone, parts.content_alone, parts.position_alone)
    assert all(np.allclose(z, sheet.values, equal_nan=True) for z, sheet in zip(drawn, sheets, strict=True))


def test_attention_by_distance_has_a_line_for_every_head(model, ids):
    profile = analysis.distance_profile(model, ids, distances=50)
    figure = plot.attention_by_distance(profile, 1, show="score")
    drawn = [trace for trace in figure.data if trace.name]
    assert [trace.name for trace in drawn] == [f"head {i}" for i in range(model.cfg.n_heads)]
    assert np.allclose([trace.y for trace in drawn], profile.score.values[1])
    assert [trace.showlegend for trace in figure.data if not trace.name] == [False]


def test_the_heads_that_use_pairs_most_stand_on_top(model):
    use = analysis.pair_use(model, rows=1, length=5, words=range(2, 90))
    figure = plot.pair_use(use, "previous", top=3)
    sums = use.previous.values.sum(-1).ravel()
    assert np.allclose(figure.data[0].z.sum(1), np.sort(sums)[::-1][:3], atol=1e-4)
    assert "the 3 heads with the largest sums" in figure.layout.title.subtitle.text
    with pytest.raises(ValueError, match="this result has previous, duplicate, induction"):
        plot.pair_use(use, "next")


def test_what_surgery_breaks_is_drawn_in_the_order_given(model, ids):
    broken = patch.rotary.breakage(model, ids, {f"pair {i}": patch.rotary.freeze(model, pair=i) for i in range(2)})
    figure = plot.breakage(broken, "agreement")
    assert np.allclose(figure.data[0].x, broken.agreement.values)
    assert list(figure.layout.yaxis.ticktext) == ["pair 0", "pair 1"]


# The cache.


def test_a_cache_says_how_long_its_entries_are_and_what_they_weigh(model, ids):
    kv = model.new_kv()
    model(ids, kv=kv)
    figure = plot.cache_norms(kv, of="values")
    expected = kv.values[:, 0, :N].flatten(2).norm(dim=-1)
    assert np.allclose(figure.data[0].z, expected.numpy(), atol=1e-5)
    each = (kv.keys[0, 0, 0].numel() + kv.values[0, 0, 0].numel()) * kv.keys.element_size()
    assert f"{each:,} bytes per entry and layer" in figure.layout.title.subtitle.text
    assert (figure.data[0].customdata == each).all()


def test_who_reads_is_summed_over_heads_or_of_one_layer(model, ids):
    reads = analysis.cache_reads(model, ids, 5)
    assert np.allclose(plot.cache_reads(reads, "attention").data[0].z.sum(1), model.cfg.n_heads, atol=1e-4)
    assert np.allclose(plot.cache_reads(reads, "direct", layer=1).data[0].z, reads.direct.values[1])
    with pytest.raises(ValueError, match="this result has attention, weighted, direct"):
        plot.cache_reads(reads, "kl")


def test_what_was_not_left_out_stays_empty(model, ids):
    left = analysis.leave_one_out(model, ids, 5, positions=[2, 3])
    z = plot.leave_one_out(left, "logit").data[0].z
    assert np.isfinite(z).any(0).nonzero()[0].tolist() == [2, 3]
    assert z.shape[0] == model.cfg.n_layers * model.cfg.n_kv_heads


def test_an_eviction_curve_goes_by_how_many_are_dropped_and_its_hover_has_the_true_cost(model, ids):
    drop = analysis.eviction_curve(model, ids, counts=[0, 2, 9])
    trace = plot.eviction(drop).data[0]
    assert list(trace.x) == [0, 2, 9]
    assert trace.y[0] == np.float32(1e-6)
    assert np.allclose(trace.y[1:], np.maximum(drop.together.values[1:], 1e-6))
    assert trace.customdata[0].startswith(f"{drop.together.values[0]:.4g} nats")


def test_a_prompt_of_which_a_result_knows_the_end_is_said_whole(model, ids):
    figure = plot.cache_reads(analysis.cache_reads(model, ids, 5))
    assert not figure.layout.title.subtitle.text.startswith("...")


# Signs.


def test_what_is_rounded_to_nothing_has_no_sign():
    assert list(plot.patch_grid(np.array([[0.0, -0.001, 2.0]])).data[1].text) == ["0.00", "0.00", "2.00"]


def test_a_generation_says_its_prompt_and_its_model(model, ids):
    figure = plot.generation(timeline.record_timeline(model, ids, 3))
    assert model.model_hash in figure.layout.title.subtitle.text
    assert len(figure.frames) == 3


def test_plain_numbers_say_the_prompt_of_their_labels_and_what_is_given():
    figure = plot.attention_pattern(EYE[:2, :2], ["the", "cat"], about={"model": "m"})
    assert figure.layout.title.subtitle.text == "the cat<br>model m"


def test_a_circuit_leads_from_keys_and_values_to_the_heads_of_their_group():
    graph = circuits.Graph(2, 4, 2)
    scores = torch.zeros(graph.mask.shape)
    for writer, reader in (("embed", "1.v1"), ("1.head2", "logits"), ("1.head3", "logits"), ("1.head1", "logits")):
        scores[graph.readers.index(reader), graph.writers.index(writer)] = 1
    figure = plot.circuit(circuits.EdgeScores(graph, scores, 0.0, {}), top=4)
    seats = {plate.text: (plate.x, plate.y) for plate in figure.layout.annotations}
    (thin,) = (trace for trace in figure.data if trace.mode == "lines" and trace.opacity is None)
    lines = set(
        zip(zip(thin.x[::3], thin.y[::3], strict=True), zip(thin.x[1::3], thin.y[1::3], strict=True), strict=True)
    )
    assert lines == {(seats["1.v1"], seats["1.head2"]), (seats["1.v1"], seats["1.head3"])}


def test_a_comparison_says_only_what_is_true_of_all_that_are_compared():
    one, other = (Labelled(EYE[0], ("head",), {}, {"metric": name, "model": "m"}) for name in ("shortness", "length"))
    text = plot.compare({"a": one, "b": other}).to_json()
    assert "shortness" not in text
    assert "model m" in text


# Tokens.


def test_coloured_tokens_are_text_and_never_markup():
    page = plot.tokens(np.linspace(-1, 1, N), HOSTILE, title=HOSTILE[0], what=HOSTILE[1])._repr_html_()
    bare = re.sub(r'<(/?(pre|div|span|br|wbr))( (class|style|title)="[^"<>]*")*>', "", page)
    assert "<" not in bare
    assert "mathjax_ignore" in page
    for token in HOSTILE:
        shown = escape(show_control_characters(token), quote=True)
        assert page.count(shown) >= 2  # in the text and on hover


def test_tokens_need_a_label_each():
    with pytest.raises(ValueError, match="2 numbers need as many labels"):
        plot.tokens([1.0, 2.0], ["a"])


def test_what_cannot_be_seen_is_drawn():
    assert show_control_characters("a\nb\tc\ud83d\u202e\x1b") == "a↵b→c⟨D83D⟩⟨202E⟩⟨001B⟩"
    assert show_control_characters("👩‍👩‍👧 字 é") == "👩‍👩‍👧 字 é"


def test_plots_come_with_the_package_but_plotly_only_when_asked():
    assert glmlens.plot is plot


INFINITE = [np.inf, -np.inf, np.nan]


def every_figure_with(bad, model, ids):
    """Figures of numbers of which some are `bad`, by name."""

    def spoilt(*shape):
        values = np.linspace(-1, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)
        values.flat[1] = bad
        return values

    def labelled(axes):
        return Labelled(spoilt(*[3 + i for i in range(len(axes))]), axes)

    graph = circuits.attribute_edges(model, ids, ids.flip(1), metric=(3, 7)).graph
    scores = torch.ones(len(graph.readers), len(graph.writers)) * graph.mask
    scores[-1, 0] = bad
    steps = [SimpleNamespace(logits=torch.tensor([x]), tokens=torch.tensor([1])) for x in ([1.0, 2.0], [bad, 1.0])]
    reads = SimpleNamespace(sheets=lambda: {"direct": labelled(("layer", "head", "key"))})
    return {
        "heatmap": plot.heatmap(spoilt(3, 4)),
        "unsigned": plot.heatmap(spoilt(3, 4), signed=False),
        "blocks": plot.heatmap(spoilt(30, 40), max_cells=8),
        "patch_grid": plot.patch_grid(spoilt(3, 4)),
        "head_scores": plot.head_scores(spoilt(3, 4)),
        "attention_pattern": plot.attention_pattern(spoilt(4, 4)),
        "by value": plot.attention_pattern(np.abs(spoilt(4, 4)), value_norms=np.array([0.0, np.inf, 1.0, 1.0])),
        "attention_heads": plot.attention_heads(spoilt(4, 5, 5)),
        "bars": plot.bars(spoilt(6)),
        "fewest bars": plot.bars(spoilt(60), top=5),
        "lines": plot.lines(spoilt(2, 5)),
        "compare lines": plot.compare({"a": spoilt(5), "b": np.zeros(5, np.float32)}),
        "compare grids": plot.compare({"a": spoilt(3, 4), "b": np.zeros((3, 4), np.float32)}),
        "residual_norms": plot.residual_norms(spoilt(3, 4, 5)),
        "residual_angles": plot.residual_angles(spoilt(3, 4, 5)),
        "who_reads": plot.cache_reads(reads, "direct"),
        "generation": plot.generation(steps),
        "circuit": plot.circuit(circuits.EdgeScores(graph, scores, 0.0, {}), top=5),
    }


@pytest.mark.parametrize("bad", INFINITE)
def test_a_number_that_is_infinite_or_none_leaves_its_cell_empty_and_the_rest_readable(bad, model, ids):
    for name, figure in every_figure_with(bad, model, ids).items():
        text = figure.to_json()
        json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
        finite = 0
        for trace in [*figure.data, *(trace for frame in figure.frames for trace in frame.data)]:
            for key in ("x", "y", "z"):
                values = getattr(trace, key, None)
                if values is not None and np.asarray(values).dtype.kind == "f":
                    assert not np.isinf(values).any(), (name, key)
                    finite += int(np.isfinite(values).sum())
        assert finite, name
        for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
            assert axis.range is None or np.isfinite(np.asarray(axis.range, float)).all(), name
        for scale in [*figure.data, figure.layout.coloraxis]:
            for end in ("zmin", "zmax", "cmin", "cmax"):
                value = getattr(scale, end, None)
                assert value is None or np.isfinite(value), (name, end)


def test_a_figure_says_how_many_numbers_are_infinite():
    values = np.ones((3, 4), np.float32)
    values[0, :2] = np.inf, -np.inf
    assert "2 infinite numbers are left empty" in plot.heatmap(values).layout.title.subtitle.text
    assert "1 infinite number is left empty" in plot.bars([1.0, np.inf]).layout.title.subtitle.text
    assert "2 infinite numbers" in plot.heatmap(np.pad(values, (0, 30)), max_cells=8).layout.title.subtitle.text
    nothing = plot.heatmap(np.full((2, 2), np.nan)).layout.title.subtitle.text
    assert "no number here is finite" in nothing
    assert "infinite" not in plot.heatmap(np.ones((2, 2))).layout.title.subtitle.text
    assert "1e300" not in plot.heatmap(np.array([[1e300, 1.0]])).to_json()


def test_what_is_written_beside_a_bar_is_its_number_also_where_it_is_none():
    from glmlens.plot.style import format_signed

    assert [format_signed("{:+.2f}", x) for x in (np.inf, -np.inf, np.nan, 0.0, -0.001)] == [
        "inf", "-inf", "nan", "0.00", "0.00",
    ]  # fmt: skip
