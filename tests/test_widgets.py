"""Explorers without a browser: what select, run, a control and a click do, what goes wrong, and what close leaves."""

import json
import subprocess
import sys
import threading

import ipywidgets as W
import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from conftest import small_lens
from ipywidgets.widgets import widget as registry

import glmlens
from glmlens.tasks import TASKS
from glmlens.widgets import AttentionExplorer, Chart, Explorer, PatchExplorer
from glmlens.widgets.chart import PlotlyLibrary
from glmlens.widgets.heads import HeadsWidget, pack_head, pack_thumbnails
from tests.closing import leaves_nothing
from tests.hostile import HOSTILE

PROMPT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def demo():
    return glmlens.load(dtype="float32")


@pytest.fixture
def attention(demo):
    explorer = AttentionExplorer(demo, PROMPT)
    yield explorer
    explorer.close()


@pytest.fixture
def patching(demo):
    explorer = PatchExplorer(demo, TASKS["ioi"].examples(demo, 3, "widgets"))
    yield explorer
    explorer.close()


class Counting(Explorer):
    """Counts to a number in slices; a place may be forbidden."""

    def __init__(self, n=3):
        self.counted, self.go, self.begun = [], threading.Event(), threading.Event()
        self.go.set()
        inputs = {"n": W.IntText(n)}
        super().__init__(small_lens(), inputs, {"place": W.IntSlider(0, 0, 9)}, [], {"n": n})

    def compute(self, inputs):
        for i in range(inputs["n"]):
            self.begun.set()
            self.go.wait(20)
            self.report_progress(i, inputs["n"])
            print("counted", i)
        if inputs["n"] < 0:
            raise ValueError("below zero")
        return list(range(inputs["n"]))

    def show(self, result=None):
        if self._state["place"] == 7:
            print("seven")
            raise ValueError("not seven")
        self.counted = self.counted if result is None else result

    def figure(self):
        return go.Figure()


def output_text(explorer):
    """The text under the charts."""
    return "".join(o["text"] if o["output_type"] == "stream" else o["evalue"] for o in explorer.output.outputs)


def triangle(data, side):
    """A lower triangle of bytes as a square of numbers from 0 to 1."""
    square = np.zeros((side, side))
    square[np.tril_indices(side)] = np.frombuffer(data, np.uint8) / 255
    return square


# ---- every explorer ----


def test_a_control_and_a_line_of_code_select_alike(attention):
    attention.places["head"].value = 5
    assert attention.state["head"] == 5
    attention.select(head=2, query=4)
    assert (attention.places["head"].value, attention.places["query"].value) == (2, 4)


def test_what_is_not_there_is_refused_with_what_there_is(attention):
    before = attention.state
    for places, words in (({"head": 8}, "0 to 7"), ({"by": "both ways"}, "'query'"), ({"heads": 1}, "layer, head")):
        with pytest.raises(ValueError, match=words):
            attention.select(**places)
    with pytest.raises(ValueError, match="run takes prompt"):
        attention.select(prompt="else")
    with pytest.raises(ValueError, match="select takes layer"):
        attention.run(head=3)
    assert attention.state == before


def test_a_state_can_be_asked_again(demo, attention):
    attention.run(prompt="the cat sat on the mat")
    attention.select(layer=3, head=1, query=4, key=2, by="query", by_value=True, locked=True)
    state = attention.state
    other = AttentionExplorer(demo, state.pop("prompt"))
    other.select(**state)
    assert other.state == attention.state
    assert other.heads.description == attention.heads.description
    other.close()


def test_what_a_callback_prints_and_raises_appears_under_the_views():
    explorer = Counting()
    explorer.places["place"].value = 7
    assert "seven" in output_text(explorer)
    assert "not seven" in output_text(explorer)
    assert explorer.state["place"] == explorer.places["place"].value == 0
    explorer.places["place"].value = 6
    assert output_text(explorer) == ""
    explorer.close()


def test_what_goes_wrong_in_code_is_raised():
    explorer = Counting()
    with pytest.raises(ValueError, match="not seven"):
        explorer.select(place=7)
    with pytest.raises(ValueError, match="below zero"):
        explorer.run(n=-1)
    assert explorer.state["n"] == 3
    explorer.run()
    assert explorer.counted == [0, 1, 2]
    explorer.close()


def test_the_run_button_works_beside_and_is_off_while_it_does(capsys):
    explorer = Counting()
    explorer.go.clear()
    explorer.run_button.click()
    assert explorer.begun.wait(20)
    assert explorer.run_button.disabled
    assert not explorer.stop_button.disabled
    with pytest.raises(RuntimeError, match="running already"):
        explorer.run()
    print("elsewhere")
    explorer.go.set()
    explorer.worker.join(20)
    assert explorer.counted == [0, 1, 2]
    assert output_text(explorer) == "counted 0\ncounted 1\ncounted 2\n"
    assert capsys.readouterr().out == "elsewhere\n"
    assert not explorer.run_button.disabled
    assert explorer.stop_button.disabled
    explorer.close()


def test_stop_ends_the_work_at_its_next_slice_and_keeps_what_was_there():
    explorer = Counting(2)
    explorer.run()
    explorer.inputs["n"].value = 1000
    explorer.go.clear()
    explorer.run_button.click()
    assert explorer.begun.wait(20)
    explorer.stop_button.click()
    explorer.go.set()
    explorer.worker.join(20)
    assert explorer.counted == [0, 1]
    assert explorer.state["n"] == 2
    assert output_text(explorer).endswith("stopped\n")
    assert not explorer.run_button.disabled
    explorer.close()


def test_work_that_goes_wrong_says_so_under_the_views():
    explorer = Counting()
    explorer.inputs["n"].value = -1
    explorer.run_button.click()
    explorer.worker.join(20)
    assert "below zero" in output_text(explorer)
    assert any(o["output_type"] == "error" for o in explorer.output.outputs)
    explorer.close()


def test_a_closed_explorer_of_attention_leaves_nothing(demo):
    leaves_nothing(lambda: AttentionExplorer(demo, PROMPT), lambda explorer: explorer.recording)


def test_a_closed_explorer_of_patching_leaves_nothing(demo):
    examples = TASKS["ioi"].examples(demo, 2, "widgets")
    leaves_nothing(lambda: PatchExplorer(demo, examples), lambda explorer: explorer.result)


def test_an_explorer_that_cannot_begin_leaves_nothing(demo):
    before = set(registry._instances)
    with pytest.raises(ValueError, match="one prompt"):
        AttentionExplorer(demo, ["a", "b"])
    assert set(registry._instances) == before


def test_closing_stops_what_is_running():
    explorer = Counting(1000)
    explorer.go.clear()
    explorer.run_button.click()
    assert explorer.begun.wait(20)
    worker, go = explorer.worker, explorer.go
    explorer.close()
    go.set()
    worker.join(20)
    assert not worker.is_alive()


def test_importing_glmlens_does_not_import_widgets():
    code = "import sys, glmlens; print('ipywidgets' in sys.modules, bool(glmlens.widgets), 'ipywidgets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_an_explorer_of_a_model_stores_no_picture_of_it(attention):
    """A notebook that keeps the state of its widgets stays small: no number is sent as text."""
    states = [
        json.dumps(w.get_state(), default=len) for w in registry._instances.values() if isinstance(w, HeadsWidget)
    ]
    assert max(map(len, states)) < 30_000


# ---- attention ----


def test_the_bytes_of_a_head_are_its_pattern(demo, attention):
    attention.select(layer=2, head=3)
    _, acts = demo.run_with_cache(PROMPT, "attn.pattern")
    pattern = acts["attn.pattern", 2][0]
    side = attention.heads.side
    assert side == pattern.shape[-1]
    assert np.abs(triangle(attention.heads.cells, side) - pattern[3].numpy()).max() <= 0.5 / 255 + 1e-6
    size = side * (side + 1) // 2
    for head in range(8):
        small = triangle(attention.heads.thumbnails[head * size : (head + 1) * size], side)
        assert np.abs(small - pattern[head].numpy()).max() <= 0.5 / 255 + 1e-6


def test_weights_by_value_norm_are_multiplied_by_it(demo, attention):
    attention.select(layer=2, head=5, by_value=True)
    _, acts = demo.run_with_cache(PROMPT, ["attn.pattern", "kv.v"])
    weighted = acts["attn.pattern", 2][0] * acts["kv.v", 2][0].norm(dim=-1).T.repeat_interleave(2, 0)[:, None]
    assert attention.heads.max_weight == pytest.approx(float(weighted.max()))
    drawn = triangle(attention.heads.cells, attention.heads.side) * attention.heads.max_weight
    assert np.abs(drawn - weighted[5].numpy()).max() <= attention.heads.max_weight / 255


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_attention_is_explored_whatever_path_computes_it(model_type):
    tokens = torch.randint(2, 101, (1, 9), generator=torch.Generator().manual_seed(1))
    pictures = []
    for path in ("eager", "sdpa"):
        explorer = AttentionExplorer(small_lens(model_type, path), tokens)
        explorer.select(layer=1, head=3)
        pictures.append(np.frombuffer(explorer.heads.cells, np.uint8).astype(int))
        explorer.close()
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_a_wish_from_the_page_is_a_select(attention):
    attention.heads._handle_custom_msg({"select": {"head": 4, "locked": True}}, [])
    assert (attention.state["head"], attention.state["locked"]) == (4, True)
    assert (attention.heads.head, attention.heads.locked) == (4, True)
    attention.heads._handle_custom_msg({"select": {"head": 99}}, [])
    assert "head 99" in output_text(attention)


def test_a_new_prompt_is_read_and_the_place_stays_where_it_can(attention):
    attention.select(layer=2, query=12, key=3)
    attention.inputs["prompt"].value = "the cat sat"
    attention.run_button.click()
    attention.worker.join(60)
    assert output_text(attention) == ""
    last = len(attention.heads.labels) - 1
    assert attention.state == attention.state | {"prompt": "the cat sat", "layer": 2, "query": last, "key": 3}
    assert attention.places["query"].max == last


def test_several_prompts_are_refused(attention):
    with pytest.raises(ValueError, match="one prompt"):
        attention.run(prompt=["a", "b"])


def test_a_long_head_is_drawn_in_blocks_with_its_strongest_links():
    n = 1000
    weights = torch.rand(32, n, n, generator=torch.Generator().manual_seed(0)).tril() ** 8 / 100
    weights[7, 900, 123] = 1.0
    small, whole = pack_thumbnails(weights, 1.0), pack_head(weights[7], 7, 1.0)
    assert (small["thumbnail_side"], small["thumbnail_block"], whole["side"], whole["block"]) == (125, 8, 500, 2)
    size = 125 * 126 // 2
    assert triangle(small["thumbnails"][7 * size : 8 * size], 125)[900 // 8, 123 // 8] == 1
    assert triangle(whole["cells"], 500)[450, 61] == 1
    k = whole["top_k"]
    at = np.frombuffer(whole["top_at"], np.uint32).reshape(2, n, k)
    assert at[0, 900, 0] == 123
    assert at[1, 123, 0] == 900
    assert sum(len(x) for x in (small | whole).values() if isinstance(x, bytes)) < 800_000


def test_hostile_tokens_reach_the_page_as_text_that_can_be_sent(attention, monkeypatch):
    monkeypatch.setattr(attention.lens, "to_labels", lambda tokens: HOSTILE[: tokens.shape[1]])
    attention.run(prompt="a b c d e f g h")
    attention.select(query=3, key=1)
    sent = json.dumps([*attention.heads.labels, attention.heads.description], ensure_ascii=False)
    sent.encode()  # no half character
    assert HOSTILE[0] in attention.heads.labels
    assert HOSTILE[3] in attention.heads.description


def test_the_figure_of_an_explorer_is_its_own(attention):
    attention.select(layer=2, head=3)
    figure = attention.figure()
    assert type(figure) is go.Figure
    before = np.array(figure.data[0].z)
    attention.select(layer=0)
    assert np.array_equal(figure.data[0].z, before)


# ---- patching ----


def click(chart, row, column):
    """What the page sends when a cell of a heatmap is clicked."""
    chart.on_message(None, {"click": [row, column]}, [])


def test_the_grid_is_the_sweep_and_a_cell_is_its_own_run(demo, patching):
    patching.run(site="attn.z", over="head")
    swept = patching.result.sweep
    assert np.allclose(patching.grid_chart.figure.data[0].z, swept.values, atol=1e-6)
    for row, column in ((0, 0), (1, 3), (3, 7)):
        patching.select(row=row, column=column)
        right, wrong = patching.result.answers
        logits = patching.changed_run[1].logits
        metric = float(logits[right] - logits[wrong])
        assert metric == pytest.approx(float(swept.raw.at(pair=0).values[row, column]), abs=1e-3)


def test_a_click_on_a_cell_selects_it(patching):
    click(patching.grid_chart, 2, 5)
    assert (patching.state["row"], patching.state["column"]) == (2, 5)
    frame = patching.grid_chart.figure.layout.shapes[-1]
    assert (frame.x0, frame.y0) == (4.5, 1.5)


def test_a_click_on_a_head_shows_how_its_attention_changes(patching):
    patching.select(row=0, view="heads")
    click(patching.detail_chart, 2, 6)
    assert patching.state == patching.state | {"layer": 2, "head": 6, "view": "head"}
    base, changed = patching.base_and_changed_run()
    assert np.allclose(
        patching.detail_chart.figure.data[0].z, (changed.patterns - base.patterns)[2, 6].numpy(), atol=1e-6
    )


def test_prompts_of_another_length_are_refused_under_the_views(patching):
    patching.inputs["corrupt"].value = "a b"
    patching.run_button.click()
    patching.worker.join(60)
    assert "tokens" in output_text(patching)
    assert patching.state["corrupt"] != "a b"


def test_another_example_is_run(patching):
    texts = patching.state["clean"]
    patching.select(example=1)
    assert patching.state["clean"] == patching.inputs["clean"].value != texts
    patching.places["example"].value = 2
    patching.worker.join(60)
    assert patching.state["clean"] == patching.examples[2].item.text


def test_an_example_and_a_cell_of_its_grid_are_selected_at_once(patching):
    patching.select(example=1)
    cell = {"row": 0, "column": 0, "view": "heads"}
    patching.select(**cell, example=2)
    assert patching.state == patching.state | cell | {"example": 2, "clean": patching.examples[2].item.text}


def test_a_metric_of_ones_own_is_called_and_what_it_prints_is_seen(demo):
    def mine(logits):
        print("measured", logits.shape[0])
        return logits[:, 5]

    explorer = PatchExplorer(demo, "Mary likes", "John likes", (" Mary", " John"), metrics={"mine": mine})
    explorer.inputs["metric"].value = "mine"
    explorer.run_button.click()
    explorer.worker.join(60)
    assert "measured" in output_text(explorer)
    assert explorer.state["metric"] == "mine"
    assert np.allclose(explorer.result.sweep.clean, float(demo("Mary likes")[0, -1, 5]), atol=1e-4)
    explorer.close()


def test_a_stopped_sweep_shows_what_was_done(demo):
    calls = 0

    def stopping(logits):
        nonlocal calls
        calls += 1
        if calls == 3:  # after the two plain runs
            explorer.stop()
        return logits[:, 5]

    long = PROMPT + " Mary. " + PROMPT
    explorer = PatchExplorer(demo, long, long.replace("Mary", "Tom"), (" Mary", " John"), metrics={"mine": stopping})
    explorer.run(metric="mine")
    assert not explorer.result.sweep.finished
    assert 0 < np.isfinite(explorer.result.sweep.values).sum() < explorer.result.sweep.values.size
    assert "stopped" in explorer.grid_figure().layout.title.subtitle.text
    explorer.close()


def test_what_a_patch_explorer_is_given_must_be_pairs(demo):
    with pytest.raises(ValueError, match="answers"):
        PatchExplorer(demo, "a", "b")
    with pytest.raises(ValueError, match="no counterfactual 'x'"):
        PatchExplorer(demo, TASKS["ioi"].examples(demo, 1, "widgets"), "x")


def test_a_page_hears_of_a_chart_when_it_is_whole(monkeypatch):
    told, tell = [], registry.Widget.open
    monkeypatch.setattr(registry.Widget, "open", lambda self: (told.append(self.get_state()), tell(self)))
    chart = Chart()
    chart.draw(go.Figure(go.Heatmap(z=np.eye(3)), {"title": {"text": "one"}}))
    (state,) = [state for state in told if state["_model_module"] == "anywidget"]
    sent = json.loads(state["figure"])
    assert sent["data"][0]["type"] == "heatmap"
    assert sent["layout"]["title"]["text"] == "one"
    assert state["config"]["showSendToCloud"] is False
    assert state["page_id"] == chart.drawing.model_id
    chart.close()


def test_plotly_is_sent_once_for_all_charts():
    charts = [Chart(), Chart()]
    for chart in charts:
        chart.draw(go.Figure(go.Bar(y=[1, 2])))
    assert charts[0].drawing.library == charts[1].drawing.library
    assert all(len(str(chart.drawing.get_state())) < 20_000 for chart in charts)
    for chart in charts:
        chart.close()
    again = Chart()
    again.draw(go.Figure(go.Bar(y=[1, 2])))
    assert PlotlyLibrary.widget.model_id == again.drawing.library
    assert PlotlyLibrary.widget.comm is not None
    again.close()


def test_a_chart_becomes_another_figure_and_leaves_nothing_of_the_last():
    chart = Chart()
    first = go.Figure(go.Heatmap(z=np.eye(3), customdata=np.eye(3)), {"title": {"text": "one"}, "height": 300})
    second = go.Figure(go.Heatmap(z=[[np.nan, 1.0], [2.0, 3.0]]), {"xaxis": {"range": [0, 1]}})
    for figure in (first, second, go.Figure(go.Bar(y=[1, 2])), first):
        chart.draw(figure, (0, 1))
        sent = json.loads(chart.drawing.figure, parse_constant=pytest.fail)
        assert sent == json.loads(figure.to_json())
        assert len(sent["layout"]["shapes"]) == 2
    drawing = chart.drawing
    chart.close()
    assert drawing.comm is None
    assert drawing.figure == ""
