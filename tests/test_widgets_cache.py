"""CacheInspector without a browser: what is drawn is what the analyses say, and a change is a rerun with it."""

import numpy as np
import pytest
from hostile import HOSTILE
from test_widgets import PROMPT, click, output_text

import glmlens
from glmlens import analysis, cache, timeline
from glmlens.cache import CacheError
from glmlens.widgets import CacheInspector, base
from tests.closing import leaves_nothing


@pytest.fixture(scope="module")
def demo():
    return glmlens.load(dtype="float32")


@pytest.fixture(scope="module")
def line(demo):
    return timeline.record_timeline(demo, PROMPT, 6)


@pytest.fixture
def inspector(demo):
    explorer = CacheInspector(demo, PROMPT, 6)
    yield explorer
    explorer.close()


def drawn(chart):
    return np.array(chart.figure.data[0].z)


def test_a_run_in_slices_is_the_run_in_one_piece(inspector, line):
    assert inspector.original_timeline.tokens == line.tokens
    assert np.allclose(inspector.original_timeline.logits, line.logits, atol=1e-4)


def test_the_picture_is_how_the_step_reads_every_entry(demo, inspector, line):
    inspector.select(step=3, layer=2, kv=1, position=6)
    memory = line.restore_state(3)
    reads = analysis.cache_reads(demo, memory, line.tokens[3])
    for by in ("attention", "weighted", "direct"):
        inspector.select(by=by)
        wanted = reads.sum_by_kv_head(by, 4).values[:, 1, :-1]
        assert np.allclose(drawn(inspector.entries_chart), wanted, atol=1e-3)
        assert np.allclose(drawn(inspector.heads_chart), reads.sheets()[by].values[:, :, 6], atol=1e-3)
    for by, stored in (("keys", memory.kv.keys), ("values", memory.kv.values)):
        inspector.select(by=by)
        wanted = stored[:, 0, : memory.kv.length, 1].norm(dim=-1)
        assert np.allclose(drawn(inspector.entries_chart), wanted, atol=1e-3)


def test_the_cache_grows_with_the_steps(inspector):
    inspector.select(step=0, by="keys")
    before = drawn(inspector.entries_chart).shape[1]
    inspector.places["step"].value = 4
    assert drawn(inspector.entries_chart).shape[1] == before + 4
    assert inspector.places["position"].max == before + 3
    inspector.select(position=before + 3)
    assert "written at step 3" in inspector.text_lines.value
    inspector.select(step=0)
    assert inspector.state["position"] == before - 1


def test_a_step_and_an_entry_that_is_there_by_then_are_selected_at_once(inspector):
    last = inspector.places["position"].max
    inspector.select(step=5, position=last + 5)
    assert (inspector.state["step"], inspector.state["position"]) == (5, last + 5)
    with pytest.raises(ValueError, match=f"position {last + 5} asked for; there is 0 to {last}"):
        inspector.select(step=0, position=last + 5)
    assert (inspector.state["step"], inspector.state["position"]) == (5, last + 5)
    assert inspector.places["position"].max == last + 5


def test_what_is_lost_without_an_entry_is_run_when_it_is_asked_for(demo, inspector, line):
    assert inspector.losses == {}
    inspector.select(step=2, by="kl")
    left = analysis.leave_one_out(demo, line.restore_state(2), line.tokens[2])
    for kv in (0, 3):
        inspector.select(kv=kv)
        assert np.allclose(drawn(inspector.entries_chart), left.kl.values[:, kv], atol=1e-5)
    lost = inspector.losses[2]
    inspector.select(by="logit")
    assert inspector.losses[2] is lost
    assert np.allclose(drawn(inspector.entries_chart), left.logit.values[:, 3], atol=1e-3)


def test_a_slider_asks_for_what_is_lost_in_the_background(inspector):
    inspector.select(by="logit")
    inspector.places["step"].value = 1
    inspector.worker.join(60)
    assert output_text(inspector) == ""
    assert sorted(inspector.losses) == [0, 1]
    assert np.isfinite(drawn(inspector.entries_chart)).all()


def test_a_click_selects_an_entry_and_a_head_its_readers(inspector):
    click(inspector.entries_chart, 2, 5)
    assert (inspector.state["layer"], inspector.state["position"]) == (2, 5)
    click(inspector.heads_chart, 1, 7)
    assert (inspector.state["layer"], inspector.state["kv"]) == (1, 3)
    frame = inspector.heads_chart.figure.layout.shapes[-1]
    assert (frame.x0, frame.x1, frame.y0) == (5.5, 7.5, 0.5)


@pytest.mark.parametrize(
    ("what", "label", "operation"),
    [
        ("zero", "zero value", cache.ablate(layer=2, kv=1, position=5)),
        ("scale value", "scale value", cache.edit(values=lambda x, at, layer: 3 * x, layer=2, kv=1, position=5)),
        ("scale key", "scale key", cache.edit(keys=lambda x, at, layer: 3 * x, layer=2, kv=1, position=5)),
        ("drop everywhere", "evict in all layers", cache.evict(position=5)),
    ],
)
def test_an_altered_entry_is_a_rerun_with_the_operation(inspector, line, what, label, operation):
    inspector.select(step=2, layer=2, kv=1, position=5)
    inspector.alter(what, 3.0)
    wanted = line.rerun(2, at={2: operation})
    assert inspector.changed_timeline.tokens == wanted.tokens
    assert np.allclose(inspector.changed_timeline.logits, wanted.logits, atol=1e-4)
    assert inspector.state["change"] == (what, 2, 2, 1, 5, 3.0)
    assert inspector.inputs["change"].value.startswith(f"change: {label}: position 5")


@pytest.mark.parametrize("step", [0, 2])
def test_a_dropped_entry_is_lost_to_its_heads_and_leaves_the_prompt_as_it_was(demo, inspector, line, step):
    inspector.select(step=step, layer=3, kv=2, position=3)
    inspector.alter("drop")
    lost = analysis.leave_one_out(demo, line.restore_state(step), line.tokens[step], positions=[3]).logit.values[
        3, 2, 3
    ]
    logits = [run.steps[step].logits[line.tokens[step]] for run in (line, inspector.changed_timeline)]
    assert abs(lost) > 0.1
    assert float(logits[0] - logits[1]) == pytest.approx(float(lost), abs=1e-3)


def test_both_texts_stand_side_by_side_and_undo_takes_the_change_back(inspector):
    inspector.select(step=0, position=3)
    inspector.change_box.value = "drop everywhere"
    inspector.generate_button.click()
    inspector.worker.join(60)
    assert output_text(inspector) == ""
    assert "at step 0: &#x27;·Mary&#x27;" in inspector.columns_html.value
    assert "·Mary" in inspector.columns_html.value
    assert "·Bob" in inspector.columns_html.value
    inspector.select(step=0, layer=1, kv=0, position=9)
    inspector.alter("scale value", 1.0)
    assert "no divergence: one is a prefix of the other" in inspector.columns_html.value
    inspector.undo_button.click()
    inspector.worker.join(60)
    assert inspector.changed_timeline is None
    assert inspector.inputs["change"].value == ""
    assert "·Bob" not in inspector.columns_html.value


def test_a_state_with_a_change_can_be_asked_again(demo, inspector):
    inspector.select(step=1, layer=3, kv=2, position=4, by="attention")
    inspector.alter("zero")
    inspector.select(step=2, position=5)
    state = inspector.state
    other = CacheInspector(demo, PROMPT)
    other.run(**{name: state[name] for name in other.inputs})
    other.select(**{name: state[name] for name in other.places})
    assert other.state == state
    assert other.columns_html.value == inspector.columns_html.value
    other.close()


def test_a_button_acts_on_the_value_of_a_slider_that_arrives_after_it(inspector, monkeypatch):
    monkeypatch.setattr(base, "SETTLE_SECONDS", 2.0)
    inspector.select(step=0, position=2)
    inspector.generate_button.click()
    inspector.places["position"].value = 3
    inspector.worker.join(60)
    assert inspector.state["change"][4] == 3


def test_what_cannot_be_changed_is_said_under_the_views(inspector, monkeypatch):
    def refused(**places):
        raise CacheError("nothing of this can be dropped")

    monkeypatch.setattr(cache, "evict", refused)
    with pytest.raises(ValueError, match="no change 'shrink'; choose from 'drop'"):
        inspector.alter("shrink")
    inspector.select(step=0, position=14)
    inspector.change_box.value = "drop everywhere"
    inspector.generate_button.click()
    inspector.worker.join(60)
    assert "nothing of this can be dropped" in output_text(inspector)
    assert inspector.state["change"] is None
    inspector.run()
    assert inspector.changed_timeline is None


def test_another_prompt_is_without_the_change(inspector):
    inspector.select(step=0, position=3)
    inspector.alter("zero")
    inspector.run(prompt="the king of Japan lives in")
    assert inspector.state["change"] is None
    assert inspector.changed_timeline is None
    inspector.alter("zero")
    inspector.inputs["prompt"].value = "the king of France lives in"
    inspector.run_button.click()
    inspector.worker.join(60)
    assert inspector.state["change"] is None
    assert output_text(inspector) == ""


def test_a_long_generation_can_be_stopped_and_keeps_what_was_there(inspector):
    inspector.inputs["length"].value = 4000
    inspector.run_button.click()
    inspector.stop_button.click()
    inspector.worker.join(60)
    assert "stopped" in output_text(inspector)
    assert len(inspector.original_timeline.tokens) == 6


def test_a_closed_inspector_leaves_nothing(demo):
    leaves_nothing(lambda: CacheInspector(demo, PROMPT, 3), lambda explorer: explorer.original_timeline)


def test_hostile_tokens_are_text(inspector, monkeypatch):
    monkeypatch.setattr(type(inspector.lens.tokenizer), "label", lambda self, i: HOSTILE[i % len(HOSTILE)])
    inspector.run(prompt=[[2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])
    inspector.alter("zero")
    for page in (inspector.columns_html.value, inspector.text_lines.value, inspector.figure().layout.title.text):
        assert "<script" not in page
        assert "<img" not in page
        assert "<b>" not in page
        page.encode()
    (inspector.columns_html.value + inspector.text_lines.value).encode()
