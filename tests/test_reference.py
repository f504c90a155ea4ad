"""The reference pages: what they say is what the code says."""

import importlib
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import glmlens
from glmlens.hook_points import POINTS, ROOT_POINTS
from tutorials import hook_points
from tutorials.reference import MODULES, write_reference


class Seen(HTMLParser):
    """The ids of a page, and its text."""

    def __init__(self):
        super().__init__()
        self.ids, self.text, self.loads = set(), [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        if tag in ("script", "link", "img") and (given.get("src") or given.get("href")):
            self.loads.append(given.get("src") or given.get("href"))

    def handle_data(self, data):
        self.text.append(data)


def seen(path):
    page = Seen()
    page.feed(path.read_text(encoding="utf-8"))
    return page


# ---- hook points ----


def test_the_page_of_hook_points_is_what_the_code_says():
    written = hook_points.PAGE.read_text(encoding="utf-8")
    assert written == hook_points.make_page(), "run python -m tutorials.hook_points"
    assert set(re.findall(r"^\| `([\w.]+)` \| ", written.split("## Which models")[0], re.MULTILINE)) == set(POINTS)


def test_the_kinds_of_models_together_have_every_point_in_the_order_of_the_page():
    there = {words: hook_points.list_points(*how) for words, how in hook_points.KINDS.items()}
    assert set().union(*there.values()) == set(POINTS)
    for names in there.values():
        assert names == [name for name in POINTS if name in names]
    assert "attn.q_pass" not in there["all channels rotated"]
    assert "| `ln1_post.scale` | no | yes | no | no |" in hook_points.make_page()


def test_every_point_is_said_with_the_code_that_makes_it():
    said = hook_points.find_expressions()
    assert set(said) - {"scale"} == {name for name in POINTS if not name.endswith(".scale")}
    assert said["resid_mid"] == ["`resid_pre + attn_out`"]
    assert said["mlp.act"] == ["`F.silu(gate)`"]
    assert said["embed"] == ["`inputs_embeds`", "`self.embed(tokens)`"]
    assert said["mlp.up"][0].startswith("`gate, up = rearrange(self.gate_up(x)")
    assert "q.shape[-1] ** -0.5" in said["attn.scores"][0]
    assert set(ROOT_POINTS) <= set(said) | {"ln_final.scale"}


# ---- API ----


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    assert write_reference(folder).exists()
    return folder


PUBLIC = {"glmlens.hooks": ["only"], "glmlens.hook_points": ["Point", "HookError"]}  # of modules without __all__


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_its_place(pages, name):
    path, module = pages / name.replace(".", "/"), importlib.import_module(name)
    for public in set(getattr(module, "__all__", PUBLIC.get(name))) - seen(Path(f"{path}.html")).ids:
        assert (path / f"{public}.html").exists(), public  # a module has a page of its own


def test_axes_can_be_read_in_signatures_and_nothing_is_fetched(pages):
    page = seen(pages / "glmlens.html")
    assert "Float[Tensor, 'batch pos model']" in "".join(page.text)
    assert not [url for url in page.loads if "//" in url and not url.startswith("data:")]


def test_a_signature_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "unreadable.py").write_text('"""A module."""\n\ndef f(x: "Tenosr") -> int:\n    """One."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserWarning, match="Tenosr"):
        write_reference(tmp_path / "api", ("unreadable",))
    sys.modules.pop("unreadable", None)


@pytest.mark.parametrize("part", glmlens.LAZY_SUBPACKAGES)
def test_public_names_of_parts_are_documented(part):
    module = importlib.import_module(f"glmlens.{part}")
    for name in module.__all__:
        thing = getattr(module, name)
        if callable(thing) and getattr(thing, "__module__", "").startswith("glmlens"):
            assert thing.__doc__, name
