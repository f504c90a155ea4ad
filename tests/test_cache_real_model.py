"""Rotary positions and the KV cache of a real pretrained model: a grafted country changes the answer."""

import numpy as np
import pytest

import glmlens
from glmlens import analysis, cache

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def lens(real_model):
    return glmlens.load(real_model, dtype="float32")


@pytest.mark.parametrize(("here", "there", "capital"), [("France", "Japan", " Tokyo"), ("Italy", "Spain", " Madrid")])
def test_a_grafted_country_has_its_own_capital(lens, here, there, capital):
    kvs = {}
    for country in (here, there):
        kvs[country] = lens.new_kv()
        lens(lens.to_tokens(f"The capital of {country} is")[:, :-1], kv=kvs[country])
    grafted = cache.graft(lens, kvs[there], of=f" {there}", at=f" {here}")(kvs[here])
    assert lens.generate(" is", 1, kv=grafted).text == capital != lens.generate(" is", 1, kv=kvs[here]).text


def test_the_previous_token_head_finds_it_by_the_fastest_pairs(lens):
    scores, use = (f(lens, rows=2, length=12) for f in (analysis.head_scores, analysis.pair_use))
    layer, head = np.unravel_index(scores.previous.values.argmax(), scores.previous.shape)
    assert (layer, head) == (11, 1)
    lift = use.previous.values[layer, head]
    assert lift.argmax() == 0
    assert lift[:3].sum() > 0.75 * lift.sum()


def test_the_parts_of_its_scores_sum_to_them(lens):
    prompt = "When Mary and John went to the store, John gave a drink to"
    _, acts = lens.run_with_cache(prompt, "blocks.11.attn.scores")
    scores = acts["attn.scores", 11][0, 1].numpy()
    parts = analysis.score_parts(lens, prompt, 11, 1).part.values.sum(-1)
    seen = np.tril(np.ones_like(scores)).astype(bool)
    assert np.abs(parts - scores)[seen].max() <= 1e-5 * np.abs(scores[seen]).max()
