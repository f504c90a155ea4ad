"""RotaryExplorer without a browser: a pattern of some pairs is a softmax of their parts, and waves sum to scores."""

import json

import numpy as np
import pytest
import torch
from conftest import small_lens
from hostile import HOSTILE
from test_widgets import PROMPT, click, output_text

import glmlens
from glmlens import analysis
from glmlens.widgets import RotaryExplorer
from tests.closing import leaves_nothing


@pytest.fixture(scope="module")
def demo():
    return glmlens.load(dtype="float32")


@pytest.fixture(scope="module")
def parts(demo):
    return analysis.score_parts(demo, PROMPT, 1, 7)


@pytest.fixture
def rotary(demo):
    explorer = RotaryExplorer(demo, PROMPT)
    explorer.select(layer=1, head=7, query=9, key=4)
    yield explorer
    explorer.close()


def drawn(chart, trace=0, axis="z"):
    return np.array(chart.figure.data[trace][axis], float)


def test_with_everything_on_the_pattern_is_that_of_the_head(rotary, parts):
    assert np.allclose(drawn(rotary.pattern_chart), parts.pattern.values, atol=1e-5, equal_nan=True)


def test_a_pattern_of_some_pairs_is_the_softmax_of_their_parts(rotary, parts):
    rotary.select(pairs=(0, 3), content=True)
    scores = torch.tensor(parts.part.values[:, :, [0, 3, 8]]).sum(-1).nan_to_num(-torch.inf)
    assert np.allclose(np.nan_to_num(drawn(rotary.pattern_chart)), scores.softmax(-1), atol=1e-5)
    rotary.select(pairs=(), content=True)
    assert np.allclose(np.nan_to_num(drawn(rotary.pattern_chart)), np.nan_to_num(parts.content_alone.values), atol=1e-5)
    rotary.select(pairs=tuple(range(8)), content=False)
    assert np.allclose(np.nan_to_num(drawn(rotary.pattern_chart)), np.nan_to_num(parts.rotary_alone.values), atol=1e-5)
    rotary.select(pairs=(), content=False)
    assert np.allclose(np.nan_to_num(drawn(rotary.pattern_chart))[3], [0.25] * 4 + [0] * 12)


def test_waves_sum_to_the_score_at_the_distance_of_the_tokens(rotary, parts):
    for query, key in ((9, 4), (15, 3), (7, 7)):
        rotary.select(query=query, key=key)
        assert rotary.state["distance"] == query - key
        assert drawn(rotary.waves_chart, 0, "y")[query - key] == pytest.approx(parts.score.values[query, key], abs=1e-3)


def test_the_waves_of_the_mean_query_and_key_are_the_distance_profile(demo, rotary):
    rotary.select(of="mean")
    wanted = analysis.distance_profile(demo, PROMPT, distances=65).score.values[1, 7]
    assert np.allclose(drawn(rotary.waves_chart, 0, "y"), wanted, atol=1e-2)


def test_the_ring_is_at_the_distance_and_a_click_on_a_wave_moves_it(rotary):
    rotary.select(distance=30, pairs=(1,), content=False)
    assert drawn(rotary.waves_chart, -1, "x").tolist() == [30]
    assert drawn(rotary.waves_chart, -1, "y")[0] == pytest.approx(drawn(rotary.waves_chart, 0, "y")[30])
    rotary.waves_chart.on_message(None, {"click": [12]}, [])
    assert rotary.state["distance"] == rotary.places["distance"].value == 12


def test_a_click_on_the_pattern_selects_a_query_and_a_key(rotary):
    click(rotary.pattern_chart, 11, 5)
    assert rotary.state == rotary.state | {"query": 11, "key": 5, "distance": 6}
    assert "11 ·John → key 5 ·John" in rotary.text_lines.value


def test_buttons_turn_pairs_on_and_off(rotary):
    pairs = rotary.places["pairs"]
    pairs.buttons[2].value = False
    assert rotary.state["pairs"] == (0, 1, 3, 4, 5, 6, 7)
    pairs.children[-1].click()
    assert rotary.state["pairs"] == ()
    assert not any(button.value for button in pairs.buttons)
    pairs.children[-2].click()
    assert rotary.state["pairs"] == tuple(range(8))
    rotary.select(pairs=(5,))
    assert [button.value for button in pairs.buttons] == [i == 5 for i in range(8)]
    assert output_text(rotary) == ""


def test_a_button_names_its_pair_as_the_parts_of_a_score_do(rotary, parts):
    named = [f"pair {b.description.replace(')', ' tokens)')}" for b in rotary.places["pairs"].buttons]
    assert named == list(parts.part.labels["part"])[:8]


def test_a_query_takes_its_key_along_and_a_later_key_is_refused(rotary):
    rotary.places["query"].value = 2
    assert (rotary.state["key"], rotary.state["distance"]) == (2, 0)
    rotary.places["key"].value = 8
    assert "key 8 comes after query 2" in output_text(rotary)
    assert rotary.places["key"].value == 2
    with pytest.raises(ValueError, match=r"pairs 9 asked for; there are 8, 0 to 7"):
        rotary.select(pairs=(0, 9))
    assert rotary.state["pairs"] == tuple(range(8))


def test_another_prompt_is_read(rotary):
    rotary.inputs["prompt"].value = "the cat sat"
    rotary.run_button.click()
    rotary.worker.join(60)
    assert output_text(rotary) == ""
    assert drawn(rotary.pattern_chart).shape[0] == rotary.places["query"].max + 1 == rotary.state["query"] + 1
    with pytest.raises(ValueError, match="one prompt"):
        rotary.run(prompt=["a", "b"])


def test_a_state_can_be_asked_again(demo, rotary):
    rotary.select(pairs=(1, 2), content=False, of="mean", distance=3)
    state = rotary.state
    other = RotaryExplorer(demo, state.pop("prompt"))
    other.select(**state)
    assert other.state == rotary.state
    assert other.text_lines.value == rotary.text_lines.value
    other.close()


def test_a_model_all_of_whose_channels_turn_has_no_content():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    lens = small_lens(rope_parameters=rope)
    explorer = RotaryExplorer(lens, [[2, 3, 4, 5, 6, 7]])
    assert explorer.places["content"].disabled
    wanted = analysis.score_parts(lens, [[2, 3, 4, 5, 6, 7]], 0, 0).pattern.values
    assert np.allclose(drawn(explorer.pattern_chart), wanted, atol=1e-5, equal_nan=True)
    explorer.close()


def test_all_that_is_sent_is_json(rotary):
    assert json.loads(rotary.pattern_chart.drawing.figure, parse_constant=pytest.fail)["data"]


def test_a_closed_explorer_leaves_nothing(demo):
    leaves_nothing(lambda: RotaryExplorer(demo, PROMPT), lambda explorer: explorer.profile)


def test_hostile_tokens_are_text(rotary, monkeypatch):
    monkeypatch.setattr(type(rotary.lens.tokenizer), "label", lambda self, i: HOSTILE[i % len(HOSTILE)])
    rotary.run(prompt=[[2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])
    rotary.select(query=9, key=1)
    for page in (rotary.text_lines.value, *rotary.figure().layout.xaxis.ticktext):
        assert "<script" not in page
        assert "<img" not in page
        assert "<b>" not in page
        page.encode()
