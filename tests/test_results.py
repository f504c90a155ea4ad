"""Labelled results: a number is the one that a label says, never a place in the axis, also when places are left out."""

import numpy as np
import pytest
import torch
from conftest import small_lens

import glmlens
from glmlens import analysis, patch, plot
from glmlens.results import Labelled

LENS = small_lens()
TOKENS = torch.tensor([[5, 8, 13, 21, 34, 55, 8, 13, 2]])
OTHER = torch.tensor([[5, 8, 14, 21, 34, 55, 8, 14, 2]])
PROMPT = "Mary and John went to the store. John gave a drink to"


@pytest.fixture(scope="module")
def inside():
    return glmlens.load()


@pytest.fixture(scope="module")
def read(inside):
    return analysis.logit_lens(inside, PROMPT)


def swept(site, over, **options):
    return patch.sweep(LENS, TOKENS, OTHER, site, over=over, metric=(3, 7), progress=False, **options)


def test_a_layer_is_its_label_behind_a_row_of_embeddings(read):
    assert read.kl.labels["layer"] == ["embed", "0", "1", "2", "3"]
    for layer in range(4):
        assert np.array_equal(read.kl.at(layer=layer).values, read.kl.values[1 + layer])
    assert np.array_equal(read.kl.at(layer="embed").values, read.kl.values[0])
    for missing in (4, -1):
        with pytest.raises(KeyError, match="no label along layer, which has embed, 0, 1, 2, 3"):
            read.kl.at(layer=missing)


def test_a_layer_is_its_label_where_streams_before_the_mlp_stand_between(inside):
    stream = analysis.accumulated_residual(inside, PROMPT, mid=True)
    for i in range(4):
        assert np.array_equal(stream.at(layer=i).values, stream.values[2 * i + 2])


def test_a_layer_is_its_label_in_a_sweep_of_some_layers():
    whole, some = swept("resid_pre", ("layer", "pos")), swept(patch.Site("resid_pre", layer=(1, 2)), ("layer", "pos"))
    for sheet in ("raw", "unchanged"):
        left, right = getattr(some, sheet).at(pair=0, layer=2).values, getattr(whole, sheet).at(pair=0, layer=2).values
        np.testing.assert_allclose(left, right, atol=1e-4)
    np.testing.assert_allclose(some.at(layer=1).values, whole.at(layer=1).values, atol=1e-4)
    with pytest.raises(KeyError, match="no label along layer, which has 1, 2"):
        some.at(layer=0)


def test_a_layer_is_its_label_after_a_stride_which_keeps_the_last(read):
    for step in (2, 3, 4, 9):
        thin = read.kl.stride("layer", step)
        assert thin.labels["layer"][-1] == "3"
        assert np.array_equal(thin.values[-1], read.kl.values[-1])
        for label in thin.labels["layer"][1:]:
            assert np.array_equal(thin.at(layer=int(label)).values, read.kl.at(layer=int(label)).values)
    with pytest.raises(KeyError, match="which has embed, 1, 3"):
        read.kl.stride("layer", 2).at(layer=0)
    whole = read.stride("layer", 4)
    assert {tuple(sheet.labels["layer"]) for sheet in whole.sheets().values()} == {("embed", "3")}


def test_a_position_is_absolute_its_token_or_the_end(read):
    kl, last = read.kl, read.kl.shape[1] - 1
    for asked in (last, "end", -1, f"{last} ·to", np.int64(last), torch.tensor(last)):
        assert kl.at(layer=0, pos=asked) == kl.values[1, last]
    for asked in (" Mary", "Mary", 2, "2 Mary", -last + 1):
        assert kl.at(layer=0, pos=asked) == kl.values[1, 2]
    with pytest.raises(KeyError, match="'John' stands 2 times along pos, at 4 ·John, 10 ·John"):
        kl.at(pos="John")
    with pytest.raises(KeyError, match="'Peter' is no label along pos, which has 0"):
        kl.at(pos="Peter")
    for missing in (last + 1, -last - 2):
        with pytest.raises(KeyError, match=f"{missing}"):
            kl.at(pos=missing)


def test_the_end_is_refused_where_it_is_not_known():
    some = swept(patch.Site("resid_pre", pos=(0, 1, 2)), ("layer", "pos"))
    for asked in ("end", -1):
        with pytest.raises(KeyError, match="only some places along pos were asked for"):
            some.at(pos=asked)
        with pytest.raises(KeyError, match="only some places along query"):
            analysis.score_parts(LENS, TOKENS, 1, 1, query=[0, 1]).score.at(query=asked)
    tokens, mask = torch.tensor([[0, 0, 5, 8, 13], [5, 8, 13, 21, 34]]), None
    padded = analysis.logit_lens(LENS, [row[row != 0].tolist() for row in tokens]).kl
    assert mask is None
    for asked in ("end", -1):
        with pytest.raises(KeyError, match="has no numbers"):
            padded.at(pos=asked)
        with pytest.raises(KeyError, match="has no numbers"):
            padded.at(prompt=0, pos=asked)
        assert padded.at(prompt=1, layer=1, pos=asked) == padded.values[1, 2, -1]
    thin = analysis.logit_lens(LENS, TOKENS).kl.stride("pos", 5)
    assert np.array_equal(thin.at(pos=5).values, thin.values[:, 1])
    with pytest.raises(KeyError, match="only some places"):
        thin.at(pos="end")


def test_names_of_positions_are_their_labels():
    names = [{"S2": 6, "end": 8}]
    site = patch.Site("resid_pre", pos=("S2", "end"))
    found = swept(site, ("layer", "pos"), position_names=names)
    assert np.array_equal(found.at(pos="S2").values, found.values[:, 0])
    assert np.array_equal(found.at(pos="end").values, found.values[:, 1])
    with pytest.raises(KeyError, match="which has S2, end"):
        found.at(pos=0)


def test_axes_without_numbers_are_asked_by_name():
    found = Labelled(np.arange(4.0).reshape(2, 2), ("sublayer", "pair"), {"sublayer": ["attn", "mlp"]})
    assert found.at(sublayer="mlp", pair=1) == 3
    with pytest.raises(KeyError, match="no label along sublayer, which has attn, mlp"):
        found.at(sublayer=0)
    pairs = Labelled(np.arange(2.0), ("part",), {"part": ["pair 3 (20 tokens)", "content"]})
    assert pairs.at(part=3) == 0
    with pytest.raises(KeyError, match="labels along pos have no numbers"):
        Labelled(np.arange(2.0), ("pos",), {"pos": ["a", "b"]}).at(pos="end")


@pytest.mark.parametrize("wrong", [True, 1.0, 2.5, None, [1], (0, 1), torch.tensor([0, 1])])
def test_what_is_no_place_is_refused(read, wrong):
    with pytest.raises(KeyError, match="give one whole number"):
        read.kl.at(layer=wrong)


def test_figures_ask_by_label():
    some = analysis.score_parts(LENS, TOKENS, 1, 1, query=[3, 5])
    assert "query 5" in plot.score_by_pair(some).layout.title.text
    assert "query 3" in plot.score_by_pair(some, 3).layout.title.text
    with pytest.raises(KeyError, match="no label along query"):
        plot.score_by_pair(some, 0)
    reads = analysis.cache_reads(LENS, TOKENS)
    assert np.array_equal(plot.cache_reads(reads, layer=2).data[0].z, reads.weighted.values[2])
    with pytest.raises(KeyError, match="which has 0, 1, 2"):
        plot.cache_reads(reads, layer=3)


def test_a_bare_string_stands_for_its_axes():
    one = swept("attn.z", "layer")
    assert one.axes == ("layer",)
    assert np.array_equal(one.values, swept("attn.z", ["layer"]).values)
    assert swept("attn.z", "layer head").axes == ("layer", "head")
    assert patch.check_sweep(LENS, TOKENS, OTHER, "attn.z", over="layer", metric=(3, 7)).cells == 3
    pair = patch.attribution_patch(LENS, TOKENS, OTHER, "attn.z", over="layer", metric=(3, 7))
    assert np.array_equal(
        pair.values, patch.attribution_patch(LENS, TOKENS, OTHER, "attn.z", over=("layer",), metric=(3, 7)).values
    )
    with pytest.raises(patch.PatchError, match="over 'layers'"):
        swept("attn.z", "layers")
    parts = analysis.logit_attribution(LENS, TOKENS, 3, by="head")
    assert plot.logit_attribution(parts, over="layer").data[0].x is not None
    drawn = plot.heatmap(np.eye(3), axes="layer head")
    assert drawn.layout.xaxis.title.text == "head"
