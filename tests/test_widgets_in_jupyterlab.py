"""Explorers in a real JupyterLab: drawn, clicked, slid, typed into, wrong, stopped, hostile; and nothing leaves."""

import json

import pytest
from hostile import HOSTILE

from glmlens.plot.style import show_control_characters

LENS = """
import glmlens
from glmlens.widgets import AttentionExplorer, PatchExplorer
lens = globals().get("lens") or glmlens.load(dtype="float32")
for old in ("explorer",):
    if old in globals():
        globals().pop(old).close()
"""
ATTENTION = (
    LENS
    + """
explorer = AttentionExplorer(lens, "When Mary and John went to the store, John gave a drink to")
explorer.select(layer=2, head=3, query=5, key=3)
explorer
"""
)
PATCHING = (
    LENS
    + """
from glmlens.tasks import TASKS
def slow(logits):
    explorer.stopping.wait()
    return logits[:, 5]
def wrong(logits):
    print("measuring")
    raise ValueError("a metric went wrong")
explorer = PatchExplorer(lens, TASKS["ioi"].examples(lens, 2, "lab"), metrics={"slow": slow, "wrong": wrong})
explorer
"""
)
NAMED = """
from tests.hostile import HOSTILE
kind = type(lens.tokenizer)
known, kind.label = kind.label, lambda self, i: HOSTILE[i % len(HOSTILE)]
try:
    {}
finally:
    kind.label = known
explorer
"""
SHOWN = """
import numpy as np
from IPython.display import display
from glmlens import plot
from glmlens.plot.style import show_control_characters
from glmlens.results import Labelled
from tests.hostile import HOSTILE
n = len(HOSTILE)
rows = [show_control_characters(token) for token in HOSTILE]
result = Labelled(np.eye(n), ("row", "column"), {"row": rows}, {"prompt": HOSTILE[1]})
display(plot.attention_pattern(np.eye(n), HOSTILE, title=HOSTILE[0]))
display(plot.tokens(np.linspace(-1, 1, n), HOSTILE, title=HOSTILE[1]))
display(result.to_dataframe().iloc[::n + 1][lambda frame: frame.row != "$x^2$"])  # mathematics in any table
result
"""
IDS = [[*range(len(HOSTILE), 2 * len(HOSTILE))]]  # the first of them is named as the first of these
STRANGE = (
    "document.querySelectorAll('.jp-OutputArea "
    ":is(img:not(.plot-img), script, b, [onmouseover], a[href*=example], mjx-container)')"
)
DRAWN = "document.querySelector('.glmlens-heads').dataset.drawn > 0"
HEADS = "document.querySelectorAll('.glmlens-heads figure')"
GRID = "document.querySelectorAll('.jp-OutputArea .js-plotly-plot')[0]"
DETAIL = "document.querySelectorAll('.jp-OutputArea .js-plotly-plot')[1]"


def control(label, inside="input"):
    """The control of an explorer with this label."""
    found = "[...document.querySelectorAll('.jp-OutputArea .widget-inline-hbox')]"
    return f"{found}.find(e => e.querySelector('label')?.innerText === '{label}').querySelector('{inside}')"


def choose(label, value):
    """Take an option of a dropdown."""
    changed = f"(e.value = {value!r}, e.dispatchEvent(new Event('change', {{bubbles: true}})))"
    return f"(e => {changed})({control(label, 'select')})"


def button(text):
    return f"[...document.querySelectorAll('.jp-OutputArea button')].find(b => b.innerText === '{text}')"


def state(lab, name):
    """What the kernel says of the explorer that is shown: asked by a cell, so that it is shown no longer."""
    lab.cell(f"print('state:', explorer.state[{name!r}])")
    return lab.wait("document.querySelector('.jp-OutputArea').innerText.match(/state: (.*)/)?.[1]")


@pytest.fixture(autouse=True)
def nothing_went_wrong_on_the_page(lab):
    lab.errors = []
    yield
    assert lab.errors == []
    assert lab.strangers() == []


@pytest.fixture
def attention(lab):
    lab.cell(ATTENTION)
    lab.wait(DRAWN)
    lab.wait_text("layer 2, head 3: query 5 ·John → key 3 ·Mary")
    return lab


@pytest.fixture
def patching(lab):
    lab.cell(PATCHING)
    lab.wait(f"{GRID}.querySelector('.heatmaplayer image') && {DETAIL}.querySelector('.barlayer path')")
    return lab


def test_attention_is_drawn(attention):
    assert attention.run(f"{HEADS}.length") == 8
    painted = "[...document.querySelectorAll('.glmlens-heads canvas')].every(c => c.getContext('2d')" \
              ".getImageData(0, 0, 1, 1).data[3] === 255)"  # fmt: skip
    assert attention.run(painted)
    assert attention.run("document.querySelectorAll('.glmlens-heads .group').length") == 4


def test_a_click_on_a_head_selects_and_locks_it(attention):
    attention.click_on(f"{HEADS}[6]")
    attention.wait_text("layer 2, head 6")
    attention.wait("document.querySelector('figure.chosen.locked figcaption').textContent === '6'")
    assert state(attention, "locked") == "True"


def test_a_click_in_the_large_picture_selects_a_query_and_a_key(attention):
    attention.click_on("document.querySelector('.large canvas')", x=2.5 / 16, y=10.5 / 16)
    attention.wait_text("query 10")
    attention.wait_text("key 2 When")


def test_a_token_under_the_mouse_lights_what_it_reads(attention):
    attention.move(*attention.middle("document.querySelectorAll('.tokens span')[10]"))
    attention.wait("document.querySelector('.hovered').textContent.startsWith('head 3, 10 ')")
    lit = "[...document.querySelectorAll('.tokens span')].filter(s => s.style.backgroundColor).length"
    assert attention.run(lit) >= 1


def test_keys_move_through_the_heads_and_stay_out_of_the_notebook(attention):
    attention.run("document.querySelector('.glmlens-heads .grid').focus()")
    attention.press("ArrowRight")
    attention.wait_text("layer 2, head 4")
    attention.press("Enter")
    attention.wait("document.querySelector('figure.chosen.locked figcaption').textContent === '4'")
    attention.run("document.querySelector('.glmlens-heads .tokens').focus()")
    attention.press("ArrowRight", "ArrowRight")
    attention.wait_text("query 7")
    assert attention.run("document.activeElement.className") == "tokens"


LATE = "AbortSignal.patient ??= AbortSignal.timeout, AbortSignal.timeout = () => AbortSignal.patient(0), 0"
IN_TIME = "AbortSignal.timeout = AbortSignal.patient, 0"


@pytest.fixture
def late(lab):
    """A page on which the code of every widget of ours comes too late for anywidget."""
    lab.run(f"({LATE})")
    yield lab
    lab.run(f"({IN_TIME})")


def test_heads_hear_the_kernel_where_their_code_came_late(late):
    late.cell(ATTENTION)
    late.wait_text("layer 2, head 3: query 5 ·John → key 3 ·Mary")
    late.wait(f"{HEADS}.length > 6")  # the text comes with the picture of one head, the small pictures after it
    late.click_on(f"{HEADS}[6]")
    late.wait_text("layer 2, head 6")


def test_charts_hear_the_kernel_where_their_code_came_late(late):
    late.cell(PATCHING)
    late.wait(f"{GRID}.querySelector('.heatmaplayer image')")
    late.write(control("clean"), "Mary likes")
    late.write(control("corrupt"), "John likes")
    late.click_on(button("Run"))
    late.wait(f"{GRID}._fullData[0].z[0].length === 4")


def test_keys_are_all_counted_by_a_kernel_that_is_slow(lab):
    slow = """
import time
show = explorer.show
explorer.show = lambda *found: (time.sleep(0.3), show(*found))[1]
explorer"""
    lab.cell(ATTENTION.removesuffix("explorer\n") + slow)
    lab.wait_text("layer 2, head 3: query 5 ·John → key 3 ·Mary")
    lab.run("document.querySelector('.glmlens-heads .tokens').focus()")
    lab.press(*["ArrowRight"] * 8)
    lab.wait_text("query 13 ·a → key 3")


def test_a_slider_selects(attention):
    handle = control("layer", ".noUi-handle")
    attention.run(f"{handle}.focus()")
    attention.press("ArrowRight")
    attention.wait_text("layer 3, head 3")


def test_the_prompt_can_be_changed_and_run_again(attention):
    attention.write(control("prompt", "textarea"), "the cat sat on the mat")
    attention.click_on(button("Run"))
    attention.wait("document.querySelector('.tokens').textContent.includes('·mat')")
    attention.wait(f"!{button('Run')}.disabled")


def test_hostile_tokens_are_shown_as_they_are(lab):
    code = f"explorer = AttentionExplorer(lens, {IDS}); explorer.select(query=6, key=1)"
    lab.cell(LENS + NAMED.format(code))
    lab.wait(f"document.querySelectorAll('.tokens span').length === {len(HOSTILE)}")
    shown = lab.run("[...document.querySelectorAll('.tokens span')].map(s => s.textContent)")
    assert shown == [show_control_characters(token) for token in HOSTILE]
    lab.wait_text("key 1 <img src=x onerror=window.ran=1>")
    harmless(lab)


def execute(lab, code):
    """Let the kernel run this, beside the cell."""
    kernel = "window.jupyterapp.shell.currentWidget.context.sessionContext.session.kernel"
    lab.run(f"{kernel}.requestExecute({{code: {json.dumps(code)}}}).done.then(() => 0)")


def harmless(lab):
    """No token has been run, and none has become more than text."""
    assert lab.run("window.ran === undefined")
    assert lab.run(f"{STRANGE}.length") == 0


def test_hostile_tokens_of_patched_prompts_are_shown_as_they_are(lab):
    clean, corrupt = "Mary likes <b>bold</b>", "John likes <b>bold</b>"
    lab.cell(LENS + NAMED.format(f"explorer = PatchExplorer(lens, {clean!r}, {corrupt!r}, (' Mary', ' John'))"))
    lab.wait(f"{GRID}.querySelector('.heatmaplayer image') && {DETAIL}.querySelector('.barlayer path')")
    names = "[...document.querySelectorAll('.jp-OutputArea .js-plotly-plot text')].map(t => t.textContent)"
    assert any("<" in name for name in lab.run(names))
    assert lab.run(f"{control('clean')}.value") == clean
    harmless(lab)


def test_hostile_text_in_what_a_notebook_shows_is_shown_as_it_is(lab):
    lab.cell(LENS + SHOWN)
    lab.wait("document.querySelector('.jp-OutputArea .js-plotly-plot .heatmaplayer image')")
    tokens = lab.run("document.querySelector('.jp-OutputArea pre.mathjax_ignore').textContent")
    cells = lab.run("[...document.querySelectorAll('.jp-OutputArea td:nth-child(2)')].map(t => t.textContent)")
    figure = lab.run("document.querySelector('.jp-OutputArea .gtitle').textContent")
    text = lab.run("document.querySelector('.jp-OutputArea').innerText")
    assert all(show_control_characters(token) in tokens for token in HOSTILE)
    assert cells == [show_control_characters(token) for token in HOSTILE if token != "$x^2$"]
    assert figure == HOSTILE[0]
    assert "prompt: <img src=x onerror=window.ran=1>" in text  # a result
    harmless(lab)


def test_patching_is_drawn_and_a_click_on_a_cell_runs_it_again(patching):
    box = f"{GRID}.querySelector('.nsewdrag')"
    rows, columns = patching.run(f"[{GRID}._fullData[0].z.length, {GRID}._fullData[0].z[0].length]")
    x, y = patching.middle(box, 3.5 / columns, 1 - 2.5 / rows)
    patching.move(x, y)
    patching.wait(f"{GRID}.querySelector('.hovertext')")
    patching.click(x, y)
    patching.wait(f"{control('row', '.widget-readout')}.innerText === '2'")
    patching.wait(f"{control('column', '.widget-readout')}.innerText === '3'")
    patching.wait(f"{DETAIL}.querySelector('.gtitle').textContent.includes('layer 2')")


def test_a_slider_moves_the_frame_and_another_view_is_shown(patching):
    patching.click_on(button("attention of all heads"))
    patching.wait(f"{DETAIL}.querySelector('.heatmaplayer image')")
    before = patching.run(f"{GRID}.layout.shapes[1].y0")
    patching.run(f"{control('row', '.noUi-handle')}.focus()")
    patching.press("ArrowRight" if before < 2 else "ArrowLeft")
    patching.wait(f"{GRID}.layout.shapes[1].y0 !== {before}")


def test_what_was_run_and_selected_before_it_is_shown_is_drawn(lab):
    code = """explorer.run(site="attn.z", over="head")
explorer.select(view="heads")
explorer.run(site="mlp_out", over="pos")
explorer"""
    lab.cell(PATCHING.removesuffix("explorer\n") + code)
    lab.wait(f"{GRID}.querySelector('.heatmaplayer image') && {DETAIL}.querySelector('.heatmaplayer image')")


def test_a_prompt_of_another_length_is_an_error_under_the_figures(patching):
    patching.write(control("corrupt"), "too short")
    patching.click_on(button("Run"))
    patching.wait_text("PatchError", ".jp-OutputArea .jp-OutputArea")
    patching.wait(f"!{button('Run')}.disabled")


def test_what_a_metric_prints_and_raises_is_seen(patching):
    patching.run(choose("metric", "wrong"))
    patching.click_on(button("Run"))
    patching.wait_text("measuring", ".jp-OutputArea .jp-OutputArea")
    patching.wait_text("ValueError: a metric went wrong", ".jp-OutputArea .jp-OutputArea")


def test_long_work_shows_how_far_it_is_and_can_be_stopped(patching):
    patching.run(choose("metric", "slow"))
    patching.click_on(button("Run"))
    patching.wait("/\\d+ of \\d+ cells/.test(document.querySelector('.jp-OutputArea').innerText)")
    assert patching.run(f"{button('Run')}.disabled")
    patching.click_on(button("Stop"))
    patching.wait(f"!{button('Run')}.disabled")
    patching.wait_text("stopped", ".jp-OutputArea .jp-OutputArea")


def test_a_changed_pair_of_prompts_is_run(patching):
    patching.write(control("clean"), "Mary likes")
    patching.write(control("corrupt"), "John likes")
    patching.click_on(button("Run"))
    patching.wait(f"{GRID}._fullData[0].z[0].length === 4")
    patching.wait(f"{GRID}.querySelector('.heatmaplayer image')")


def test_a_chart_that_changed_out_of_sight_is_drawn_when_it_comes_back(patching):
    patching.run("(window.place = document.querySelector('.jp-OutputArea').parentElement, "
                 "window.away = document.querySelector('.jp-OutputArea'), window.away.remove(), 0)")  # fmt: skip
    execute(patching, 'explorer.run(clean="Mary likes", corrupt="John likes")')
    assert patching.run("window.place.append(window.away), 0") == 0
    patching.wait(f"{GRID}._fullData[0].z[0].length === 4")


def test_a_closed_explorer_is_gone_from_the_page(attention):
    execute(attention, "explorer.close()")
    attention.wait("!document.querySelector('.glmlens-heads')")
