"""Caches, rotary positions and generations in a real JupyterLab: drawn, clicked, slid, changed, wrong, hostile."""

import pytest
from test_widgets_in_jupyterlab import (
    DETAIL,
    GRID,
    IDS,
    LENS,
    NAMED,
    button,
    choose,
    control,
    execute,
    harmless,
    nothing_went_wrong_on_the_page,  # noqa: F401
)

BEFORE = LENS.replace(
    "import AttentionExplorer, PatchExplorer", "import CacheInspector, GenerationExplorer, RotaryExplorer"
)
PROMPT = "When Mary and John went to the store, John gave a drink to"
UNDER = ".jp-OutputArea .jp-OutputArea"


def opened(lab, code):
    """The page with an explorer whose figures are both drawn."""
    lab.cell(f"{BEFORE}explorer = {code}\nexplorer")
    lab.wait(f"{GRID}.querySelector('.heatmaplayer image') && {DETAIL}.querySelector('.trace, .heatmaplayer image')")
    return lab


@pytest.fixture
def cache(lab):
    return opened(lab, f"CacheInspector(lens, {PROMPT!r}, 4)")


@pytest.fixture
def rotary(lab):
    return opened(lab, f"RotaryExplorer(lens, {PROMPT!r})")


@pytest.fixture
def generation(lab):
    return opened(lab, f"GenerationExplorer(lens, {PROMPT!r}, 4)")


def click_cell(lab, figure, row, column, down=False):
    """Click a cell of a heatmap, as a hand does."""
    rows, columns = lab.run(f"[{figure}._fullData[0].z.length, {figure}._fullData[0].z[0].length]")
    y = (row + 0.5) / rows
    x, y = lab.middle(f"{figure}.querySelector('.nsewdrag')", (column + 0.5) / columns, y if down else 1 - y)
    lab.move(x, y)
    lab.wait(f"{figure}.querySelector('.hovertext')")
    lab.click(x, y)


def slide(lab, label, key="ArrowRight"):
    lab.run(f"{control(label, '.noUi-handle')}.focus()")
    lab.press(key)


def reads(lab, label, value):
    lab.wait(f"{control(label, '.widget-readout')}.innerText === '{value}'")


def change(lab, label, prompt):
    lab.write(control(label, "textarea"), prompt)
    lab.click_on(button("Run"))


def test_a_click_on_an_entry_of_the_cache_selects_it(cache):
    click_cell(cache, GRID, 2, 5)
    reads(cache, "layer", 2)
    reads(cache, "position", 5)
    cache.wait_text("entry 5 ·John of layer 2, kv 0, of the prompt")


def test_a_slider_goes_through_the_steps_of_a_cache(cache):
    slide(cache, "step")
    cache.wait(f"{GRID}._fullData[0].z[0].length === 16")
    cache.wait(f"{GRID}.querySelector('.gtitle').textContent.includes('before step 1 (next token .)')")


def test_an_entry_is_dropped_and_both_texts_stand_side_by_side(cache):
    click_cell(cache, GRID, 2, 3)
    reads(cache, "position", 3)
    cache.run(choose("edit entry", "evict in all layers"))
    cache.click_on(button("Apply and generate"))
    cache.wait_text("·Bob")
    cache.wait_text("at step 0: '·Mary'")
    cache.wait_text("evict in all layers: position 3, from step 0 on")


def test_the_newest_entry_is_dropped_too(cache):
    cache.run(f"{control('position', '.noUi-handle')}.focus()")
    cache.press(*["ArrowRight"] * 14)
    cache.wait_text("entry 14 ·drink")
    cache.run(choose("edit entry", "evict in all layers"))
    cache.click_on(button("Apply and generate"))
    cache.wait_text("evict in all layers: position 14, from step 0 on")
    cache.wait_text("at step 2: '")


def test_what_goes_wrong_is_an_error_under_the_figures(cache):
    broken = "def broken(*inputs): raise ValueError('nothing of this can be')\nexplorer.compute = broken"
    execute(cache, broken)
    cache.click_on(button("Apply and generate"))
    cache.wait_text("nothing of this can be", UNDER)


def test_another_prompt_has_another_cache(cache):
    change(cache, "prompt", "The king of Japan lives in")
    cache.wait(f"{GRID}._fullData[0].z[0].length === 7")


def test_what_is_lost_without_entries_shows_how_far_it_is(cache):
    cache.run(choose("colour by", "leave-one-out: KL"))
    cache.wait_text("without it: KL")
    cache.wait(f"{GRID}._fullData[0].z[0].every(isFinite)")


def test_a_click_in_a_rotary_pattern_and_sliders_select(rotary):
    click_cell(rotary, GRID, 11, 5, down=True)
    reads(rotary, "query", 11)
    reads(rotary, "key", 5)
    reads(rotary, "distance", 6)
    slide(rotary, "distance")
    rotary.wait_text("at distance 7 the score would be")


def test_a_pair_is_turned_off_and_the_pattern_changes(rotary):
    before = rotary.run(f"{GRID}._fullData[0].z[15][0]")
    rotary.click_on(button("0 (6.28)"))
    rotary.wait(f"{GRID}.querySelector('.gtitle').textContent.includes('with 7 of 8 pairs')")
    rotary.wait(f"{GRID}._fullData[0].z[15][0] !== {before}")


def test_a_key_that_comes_later_is_an_error_under_the_figures(rotary):
    slide(rotary, "query", "ArrowLeft")
    rotary.wait_text("query 14 ·drink →")  # the page says so before the kernel has heard of it
    slide(rotary, "key", "End")
    rotary.wait_text("key 15 comes after query 14", UNDER)
    reads(rotary, "key", 0)


def test_another_prompt_has_another_pattern(rotary):
    change(rotary, "prompt", "The king of Japan lives in")
    rotary.wait(f"{GRID}._fullData[0].z.length === 8")


def test_a_click_in_the_lens_selects_and_a_slider_steps_through(generation):
    click_cell(generation, GRID, 1, 2)
    reads(generation, "layer", 1)
    reads(generation, "step", 2)
    slide(generation, "step")
    generation.wait_text("step 3: ·took")


def test_a_click_on_a_bar_goes_on_with_its_token(generation):
    bar = f"{DETAIL}.querySelectorAll('.barlayer .point path')[0]"
    slide(generation, "step")
    generation.wait_text("step 1: ., ")
    slide(generation, "layer", "ArrowLeft")
    generation.wait(f"{DETAIL}.querySelector('.gtitle').textContent.includes('Top tokens at layer 2, step 1')")
    x, y = generation.middle(bar)
    generation.move(x, y)
    generation.wait(f"{DETAIL}.querySelector('.hovertext')")
    generation.click(x, y)
    generation.wait_text(" at step 1", ".widget-label")
    generation.wait("document.querySelector('.jp-OutputArea').innerText.includes('branch')")


def test_a_token_is_typed_and_both_runs_stand_side_by_side(generation):
    generation.write(control("replace token"), " John")
    generation.run(f"{control('replace token')}.dispatchEvent(new Event('change', {{bubbles: true}}))")
    generation.click_on(button("Branch here"))
    generation.wait_text("at step 0: '·Mary'")
    generation.click_on(button("branch"))
    generation.wait(f"{GRID}.querySelector('.gtitle').textContent.includes('(branch)')")


def test_what_is_not_one_token_is_an_error_under_the_figures(generation):
    generation.write(control("replace token"), "not a token")
    generation.run(f"{control('replace token')}.dispatchEvent(new Event('change', {{bubbles: true}}))")
    generation.click_on(button("Branch here"))
    generation.wait_text("not a token", UNDER)


def test_another_prompt_is_generated_from(generation):
    change(generation, "prompt", "The king of Japan lives in")
    generation.wait_text("·Tokyo")


@pytest.mark.parametrize(
    "code",
    [
        f"explorer = CacheInspector(lens, {IDS}, 3); explorer.select(position=3); explorer.alter('zero')",
        f"explorer = RotaryExplorer(lens, {IDS}); explorer.select(query=9, key=1)",
        f"explorer = GenerationExplorer(lens, {IDS}, 3); explorer.branch(7, 1)",
    ],
    ids=["cache", "rotary", "generation"],
)
def test_hostile_tokens_are_shown_as_they_are(lab, code):
    lab.cell(BEFORE + NAMED.format(code))
    lab.wait(f"{GRID}.querySelector('.heatmaplayer image') && {DETAIL}.querySelector('.main-svg')")
    lab.wait_text("<")
    harmless(lab)
