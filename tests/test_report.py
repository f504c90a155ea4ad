"""Reports: one file that opens from disk, asks for nothing, and shows hostile text as text."""

import json
import re

import numpy as np
import pandas
import pytest
from browser import Browser, chromium
from hostile import HOSTILE
from test_plot import N, steps

import glmlens
from glmlens import plot
from glmlens.html_report import save_html
from glmlens.plot.style import show_control_characters
from glmlens.results import Labelled

EYE = np.eye(N, dtype=np.float32)
BOX = "(r => [r.x, r.y, r.width, r.height])(document.querySelector('%s').getBoundingClientRect())"


@pytest.fixture(scope="module")
def browser():
    if chromium() is None:
        pytest.skip("no Chromium here")
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    """A report in which every kind of part has hostile text."""
    table = pandas.DataFrame({"token": pandas.Series(HOSTILE, dtype=object), "value": range(N)})
    parts = [
        "# " + " ".join(HOSTILE).replace("\n", " "),
        "\n".join(HOSTILE),
        plot.attention_pattern(EYE, HOSTILE, title=HOSTILE[0], subtitle=HOSTILE[3]),
        plot.tokens(np.linspace(-1, 1, N), HOSTILE, title=HOSTILE[0]),
        plot.generation(steps(), HOSTILE.__getitem__),
        Labelled(EYE, ("row", "column"), {"row": HOSTILE}, {"prompt": HOSTILE[0]}),
        table,
    ]
    return save_html(tmp_path_factory.mktemp("hostile") / "r.html", HOSTILE[0], parts)


def test_a_report_is_one_file_with_plotly_once_and_nothing_to_fetch(tmp_path):
    figure = plot.heatmap(np.eye(3))
    page = save_html(tmp_path / "new" / "r.html", "two", [figure, "text", figure]).read_text()
    assert page.count("plotly.js v") == 1
    assert page.count('class="plotly-graph-div"') == 2
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert len(page) < 6_000_000
    small = save_html(tmp_path / "r.html", "online", [figure], offline=False).read_text()
    assert len(small) < 20_000
    assert "integrity=" in small


def test_the_same_parts_give_the_same_file(tmp_path):
    parts = ["# A", plot.heatmap(np.eye(3)), "text"]
    one, two = (save_html(tmp_path / name, "t", parts).read_bytes() for name in ("a.html", "b.html"))
    assert one == two


def test_a_report_is_made_by_either_name(tmp_path):
    assert glmlens.save_html is save_html
    assert "<h1>mine</h1>" in glmlens.save_html(tmp_path / "r.html", "mine", [plot.heatmap(np.eye(3))]).read_text()


def test_hostile_text_in_a_report_is_escaped(hostile_page):
    page = hostile_page.read_text()
    for part in ("<script>window.ran", "<img src=x", "onerror=window.ran=1>", "<b>bold"):
        assert part not in page
    assert page.count("&lt;script&gt;window.ran") >= 6


def test_a_report_opens_from_disk_without_an_error_or_a_request(browser, hostile_page):
    browser.open(hostile_page)
    assert browser.errors == []
    asked = [url for url in browser.requests if not url.startswith(("data:", "blob:"))]
    assert asked == [hostile_page.resolve().as_uri()]


def test_hostile_tokens_are_shown_literally_and_never_run_in_a_browser(browser, hostile_page):
    browser.open(hostile_page)
    ticks = browser.run("[...document.querySelectorAll('#figure-0 .x2tick text')].map(t => t.textContent)")
    expected = [f"{i} {show_control_characters(t)}" for i, t in enumerate(HOSTILE)]
    assert len(ticks) == N
    for tick, token in zip(ticks, expected, strict=True):
        assert tick == token or (tick.endswith("…") and token.startswith(tick[:-1]))
    title = "document.querySelector('#figure-0 .gtitle').textContent"
    assert browser.run(title) == HOSTILE[0]
    tokens = browser.run("document.querySelector('.mathjax_ignore').textContent")
    assert all(show_control_characters(token) in tokens for token in HOSTILE)
    cells = browser.run("[...document.querySelectorAll('td:nth-child(2)')].map(t => t.textContent)")
    assert cells[:5] == HOSTILE[:5]
    assert browser.run("document.title") == HOSTILE[0]
    assert browser.run("window.ran === undefined")
    assert (
        browser.run("document.querySelectorAll('img, a[href*=example], mjx-container, b, [onmouseover]').length") == 0
    )


def test_a_hostile_token_is_whole_and_harmless_on_hover(browser, hostile_page):
    browser.open(hostile_page)
    box = browser.run(BOX % "#figure-0 .nsewdrag")
    for i in (0, 1, 3, 4):
        at = box[0] + (i + 0.5) * box[2] / N, box[1] + (i + 0.5) * box[3] / N
        assert "attention 1" in browser.hover(*at, f"query {i} {HOSTILE[i]}, key {i} {HOSTILE[i]}")
    assert browser.run("window.ran === undefined")


def test_hostile_names_of_lines_are_literal_in_the_legend_the_title_and_on_hover(browser, tmp_path):
    figure = plot.lines(np.ones((N, 2)) * np.arange(N)[:, None], {"series": HOSTILE}, title=HOSTILE[10], height=600)
    browser.open(save_html(tmp_path / "l.html", "l", [figure]))
    said = browser.run("[...document.querySelectorAll('.legendtext')].map(t => t.textContent)")
    assert said == [show_control_characters(token) for token in HOSTILE]
    assert browser.run("document.querySelector('.gtitle').textContent") == HOSTILE[10]
    point = browser.run(
        "(r => [r.x + r.width / 2, r.y + r.height / 2])([...document.querySelectorAll('.trace')][10]"
        ".querySelector('.point').getBoundingClientRect())"
    )
    browser.hover(*point, HOSTILE[10])
    assert browser.run("window.ran === undefined")


def test_the_slider_of_a_saved_generation_goes_through_its_steps(browser, tmp_path):
    figure = plot.generation(steps(4), HOSTILE.__getitem__, top=3)
    browser.open(save_html(tmp_path / "g.html", "g", [figure]))
    bars = "JSON.stringify([...document.querySelectorAll('#figure-0 .bartext')].map(t => t.textContent))"
    seen = [browser.run(bars)]
    x, y, width, height = browser.run(BOX % ".slider-rail-touch-rect")
    for share in (0.36, 0.66, 0.97):
        browser.click(x + share * width, y + height / 2)
        browser.wait(f"!{json.dumps(seen)}.includes({bars})")
        seen.append(browser.run(bars))
    assert browser.errors == []


def test_a_report_reads_in_light_and_in_dark(browser, tmp_path):
    page = save_html(tmp_path / "r.html", "t", ["text", plot.heatmap(np.eye(3))])
    color = "(e => getComputedStyle(e).{})(document.querySelector('{}'))"
    for dark in (False, True):
        browser.open(page, dark)
        assert browser.run(color.format("backgroundColor", "#figure-0 .main-svg")) == "rgba(0, 0, 0, 0)"
        assert browser.run(color.format("fill", "#figure-0 .gtitle")) == "rgb(128, 128, 128)"
        assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") is dark
