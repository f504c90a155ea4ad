"""GenerationExplorer without a browser: every layer's reading of every step, and branches that are reruns."""

import numpy as np
import pytest
from hostile import HOSTILE
from test_widgets import PROMPT, click, output_text

import glmlens
from glmlens import timeline
from glmlens.widgets import GenerationExplorer
from tests.closing import leaves_nothing


@pytest.fixture(scope="module")
def demo():
    return glmlens.load(dtype="float32")


@pytest.fixture(scope="module")
def line(demo):
    return timeline.record_timeline(demo, PROMPT, 6)


@pytest.fixture
def generation(demo):
    explorer = GenerationExplorer(demo, PROMPT, 6)
    yield explorer
    explorer.close()


def drawn(chart, axis="z"):
    return np.array(next(trace for trace in chart.figure.data if trace.type in ("heatmap", "bar"))[axis], float)


def click_bar(chart, i):
    chart.on_message(None, {"click": [i]}, [])


def test_the_picture_is_the_logit_lens_of_every_step(generation, line):
    probabilities = line.unembed_layers().softmax(-1)
    assert np.allclose(drawn(generation.lens_chart), probabilities.amax(-1), atol=1e-4)
    generation.select(by="chosen")
    assert np.allclose(drawn(generation.lens_chart), line.logit_lens().values, atol=1e-4)


def test_a_run_and_a_step_that_only_it_has_are_selected_at_once(demo, generation):
    short = timeline.record_timeline(demo, PROMPT, 2)
    generation.runs = {**generation.runs, "branch": (short, generation.predict_by_layer(short))}
    generation.select(run="branch")
    assert generation.places["step"].max == 1
    generation.select(run="first", step=5)
    assert (generation.state["run"], generation.state["step"]) == ("first", 5)
    with pytest.raises(ValueError, match="there is 0 to 1"):
        generation.select(run="branch", step=5)
    assert generation.places["step"].max == 5


def test_the_bars_are_the_most_probable_tokens_of_a_layer_and_step(generation, line):
    generation.select(layer=2, step=3)
    wanted = line.unembed_layers().softmax(-1)[2, 3].topk(8).values
    assert np.allclose(drawn(generation.tokens_chart, "x"), wanted, atol=1e-4)


def test_a_branch_is_a_rerun_with_another_token(demo, generation, line):
    generation.select(step=1)
    generation.branch(" and")
    wanted = line.rerun(1, token=" and")
    assert generation.changed_timeline.tokens == wanted.tokens
    assert np.allclose(generation.changed_timeline.logits, wanted.logits, atol=1e-4)
    assert generation.state["branch"] == (1, demo.to_single_token(" and"))
    assert generation.inputs["branch"].value == "branch: ·and at step 1"
    generation.select(run="branch", layer=3)
    assert np.allclose(drawn(generation.lens_chart)[-1], wanted.logits.softmax(-1).amax(-1), atol=1e-4)
    assert "at step 1: &#x27;.&#x27;" in generation.columns_html.value


def test_a_branch_at_the_last_step_is_only_that_token(demo, generation, line):
    generation.branch(" king", 5)
    assert generation.changed_timeline.tokens == [*line.tokens[:5], demo.to_single_token(" king")]


def test_a_click_selects_a_step_and_one_on_a_bar_goes_on_with_its_token(generation):
    click(generation.lens_chart, 3, 2)
    assert (generation.state["layer"], generation.state["step"]) == (3, 2)
    second = int(generation.runs["first"][1].ids[3, 2, 1])
    click_bar(generation.tokens_chart, 1)
    generation.worker.join(60)
    assert output_text(generation) == ""
    assert generation.state["branch"] == (2, second)
    assert generation.changed_timeline.tokens[2] == second


def test_a_branch_has_no_branches(generation):
    generation.branch(" home", 1)
    generation.select(run="branch", step=3)
    click_bar(generation.tokens_chart, 1)
    generation.worker.join(60)
    assert "branch from the original run" in output_text(generation)
    assert generation.state["branch"][0] == 1


def test_a_token_is_typed_or_taken_from_those_shown(demo, generation):
    generation.places["step"].value = 1
    for typed, token in ((generation.token_box.options[2], None), (" home", demo.to_single_token(" home"))):
        wanted = int(generation.runs["first"][1].ids[3, 1, 2]) if token is None else token
        generation.token_box.value = typed
        generation.branch_button.click()
        generation.worker.join(60)
        assert output_text(generation) == ""
        assert generation.changed_timeline.tokens[1] == wanted
    generation.undo_button.click()
    generation.worker.join(60)
    assert generation.changed_timeline is None


def test_what_is_not_one_token_is_said_under_the_views(generation):
    generation.token_box.value = "two words"
    generation.branch_button.click()
    generation.worker.join(60)
    assert "two words" in output_text(generation)
    with pytest.raises(ValueError, match="this model has 0 to 1109"):
        generation.branch(5000)
    with pytest.raises(ValueError, match="there is no branch"):
        generation.select(run="branch")
    with pytest.raises(IndexError, match="step 9 asked for; there are 6, 0 to 5"):
        generation.branch(" home", 9)
    assert generation.state["run"] == "first"
    generation.run()
    assert generation.changed_timeline is None


def test_another_length_keeps_the_branch_and_another_prompt_does_not(generation):
    generation.branch(" home", 1)
    generation.run(length=9)
    assert len(generation.original_timeline.tokens) == len(generation.changed_timeline.tokens) == 9
    generation.select(run="branch", step=8)
    generation.run(prompt="the king of Japan lives in", length=3)
    assert generation.changed_timeline is None
    assert (generation.state["run"], generation.state["step"]) == ("first", 2)


def test_a_state_can_be_asked_again(demo, generation):
    generation.branch(" home", 1)
    generation.select(run="branch", step=3, layer=1, by="chosen")
    state = generation.state
    other = GenerationExplorer(demo, PROMPT)
    other.run(**{name: state[name] for name in other.inputs})
    other.select(**{name: state[name] for name in other.places})
    assert other.state == state
    assert (other.columns_html.value, other.text_lines.value) == (
        generation.columns_html.value,
        generation.text_lines.value,
    )
    other.close()


def test_a_closed_explorer_leaves_nothing(demo):
    leaves_nothing(lambda: GenerationExplorer(demo, PROMPT, 3), lambda explorer: explorer.original_timeline)


def test_hostile_tokens_are_text(generation, monkeypatch):
    monkeypatch.setattr(type(generation.lens.tokenizer), "label", lambda self, i: HOSTILE[i % len(HOSTILE)])
    generation.run(prompt=[[2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])
    generation.branch(7, 1)
    figure = generation.figure()
    drawn = [*figure.data[1].text, *np.ravel(figure.data[0].customdata)]
    for page in (generation.columns_html.value, generation.text_lines.value, *figure.layout.xaxis.ticktext, *drawn):
        assert "<script" not in page
        assert "<img" not in page
        assert "<b>" not in page
        page.encode()
