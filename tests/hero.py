"""Draw the picture of the README, from the model inside the package: python -m tests.hero OUT.png."""

import sys
import tempfile
from pathlib import Path

import glmlens
from glmlens import analysis, patch, plot
from glmlens.patch import Site
from glmlens.tasks import TASKS
from tests.browser import Browser
from tests.screenshots import PROMPT

WORDS = " first Hungary found Greek Rose height night" * 2

PAGE = """<!doctype html><meta charset="utf-8"><style>body {{ margin: 0; padding: 6px; width: 1240px; display: flex;
flex-wrap: wrap; background: white; }} .modebar {{ display: none }}</style>{figures}"""


def figures(lens):
    """Return two rows of two: a logit lens, a patching grid, an attention pattern, and rotary pairs."""
    size = {"height": 200, "subtitle": ""}
    lens_by_layer = analysis.logit_lens(lens, PROMPT)
    yield plot.logit_lens(lens_by_layer, **{**size, "width": 860, "title": "Logit lens: the most probable next token"})
    pairs = TASKS["ioi"].examples(lens, 24, "demo").of_length()
    grid = patch.sweep(lens, pairs, "flip", Site("resid_pre", pos=("IO", "S1", "S2", "end")), over=("layer", "pos"),
                       progress=False)  # fmt: skip
    yield plot.patch_grid(grid, **{**size, "width": 378, "title": "Where a patch restores the answer"})
    _, acts = lens.run_with_cache(WORDS)
    pattern, labels = acts["attn.pattern", 3][0, 4], lens.to_labels(WORDS)
    tall = {**size, "height": 420, "width": 619}
    yield plot.attention_pattern(
        pattern, labels, **{**tall, "title": "Head 3.4: attends to the token after an earlier occurrence"}
    )
    use = analysis.pair_use(lens)
    yield plot.pair_use(use, top=14, **{**tall, "title": "Rotary pairs that raise its score"})


def main(out):
    """Draw the figures, take a screenshot, and print its size."""
    html = [
        figure.to_html(full_html=False, include_plotlyjs=i == 0, config={"displayModeBar": False}, div_id=f"figure-{i}")
        for i, figure in enumerate(figures(glmlens.load(dtype="float32")))
    ]
    page = Path(tempfile.mkdtemp()) / "hero.html"
    page.write_text(PAGE.format(figures="".join(html)), encoding="utf-8")
    browser = Browser(1252, 900)
    browser.open(page).picture(out)
    browser.close()
    print(f"{Path(out).stat().st_size / 1000:.0f} kB", *browser.errors)


if __name__ == "__main__":
    main(*sys.argv[1:])
