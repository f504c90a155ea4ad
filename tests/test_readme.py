"""The README: its tour runs, and the names and links in it exist."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_tour_runs_from_top_to_bottom(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 7
    world = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), world)
    assert world["acts"]["resid_post"].ndim == 4
    assert float(abs(world["logits"] - world["ablated"]).max()) > 0
    assert world["steered"].tokens.tolist() != world["run"].tokens.tolist()
    assert "rank" in capsys.readouterr().out


def test_every_point_that_the_readme_names_exists():
    from glmlens.hook_points import POINTS

    names = re.findall(
        r"`([a-z_12]+(?:\.[a-z_12]+)?)`", README.read_text().split("**Names.**")[1].split("- **Numbers")[0]
    )
    assert set(names) <= set(POINTS)
    assert len(names) >= 25


def test_every_name_in_the_page_for_transformerlens_users_is_answered():
    from glmlens.hook_points import POINTS, TRANSFORMERLENS_NAMES

    page = (README.parent / "tutorials" / "from_transformerlens.md").read_text().split("## Points")[1]
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) >= 12
    for theirs, ours in rows:
        names = re.findall(r"`([\w.]+)`", theirs)
        prefixes = {name.split(".")[0] + "." for name in names if "." in name} | {""}
        for name in names:
            assert any(prefix + name in TRANSFORMERLENS_NAMES for prefix in prefixes), name
        for name in re.findall(r"`([\w.]+)`", ours):
            assert name in POINTS, name


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", README.read_text()))
def test_links_lead_somewhere(link):
    assert (README.parent / link).exists()
