"""The course: every tutorial runs, its claims hold, and its checks accept right answers and reject wrong ones."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from glmlens.course import source
from glmlens.course.feedback import (
    WrongAnswer,
    check_equal,
    check_hooks,
    demand,
    describe_answer,
    exercise,
    to_head,
    to_number,
)
from glmlens.model import GLM, Block, RMSNorm, apply_rotary
from tutorials.build import notebook, sources

ROOT = Path(__file__).parents[1]
COURSE = sources(ROOT / "tutorials")
LINK = re.compile(r"\]\(([^)]*\.ipynb)\)")
each = pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def studied(tmp_path_factory, request):
    """Return a function that gives the results of a tutorial, run in a process of its own in another folder."""
    paths = {item.callspec.params["path"] for item in request.session.items if "studied" in item.fixturenames}
    copies = []
    for path in sorted(paths):
        copies.append(tmp_path_factory.mktemp(path.stem) / f"{path.stem}.ipynb")
        copies[-1].write_bytes(path.with_suffix(".ipynb").read_bytes())
    argv = [sys.executable, "-W", "error", ROOT / "tests" / "study.py", "--apart", *copies]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that wait for each other count as work
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)

    def study(path):
        assert "error" not in results[path.stem], results[path.stem]["error"][-3000:]
        return results[path.stem]

    return study


@each
def test_a_tutorial_runs_from_top_to_bottom_without_a_warning(path, studied):
    result = studied(path)
    assert result["figures"] >= 1
    assert result["seconds"] < 30


@each
def test_solutions_are_accepted_and_wrong_turns_are_not(path, studied):
    exercises = studied(path)["exercises"]
    assert len(exercises) >= 3
    for name, found in exercises.items():
        assert found["untouched"] == [None], name
        assert found["solution"] == [True], (name, found["said"])
        assert found["a wrong turn"], name
        assert set(found["a wrong turn"]) == {False}, (name, found["said"])
        assert not [said for said in found["said"] if "it raised" in said], name


@each
def test_every_exercise_has_its_check_and_every_check_its_exercise(path, studied):
    checks = importlib.import_module(f"glmlens.course.check_{path.stem[:2]}")
    assert {name for name in vars(checks) if name.startswith("exercise_")} == set(studied(path)["exercises"])


@each
def test_a_tutorial_has_formulas_claims_that_are_asserted_and_sources(path):
    cells = nbformat.reads(path.with_suffix(".ipynb").read_text(encoding="utf-8"), 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert "$$" in text
    assert len(re.findall(r"^assert ", code, re.MULTILINE)) >= 5
    assert re.search(r"^## Sources$", text, re.MULTILINE)


@pytest.mark.parametrize("path", [*COURSE, *sources(ROOT / "notebooks")], ids=lambda path: path.stem)
def test_a_notebook_is_what_its_source_says_and_holds_no_output(path):
    built = path.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert built == notebook(path), "run python -m tutorials.build"
    assert len(built) < 1_000_000
    read = nbformat.reads(built, 4)
    assert "widgets" not in read.metadata
    for cell in read.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@each
def test_the_index_leads_to_every_tutorial(path):
    index = LINK.findall((ROOT / "tutorials" / "README.md").read_text(encoding="utf-8"))
    assert f"{path.stem}.ipynb" in index
    assert set(LINK.findall(path.read_text(encoding="utf-8"))) <= set(index)


def test_a_cell_keeps_its_id_when_another_is_put_before_it(tmp_path):
    (tmp_path / "a.py").write_text("# %%\n1\n\n# %%\n1\n")
    (tmp_path / "b.py").write_text("# %%\n2\n\n# %%\n1\n\n# %%\n1\n")
    assert [path.name for path in sources(tmp_path)] == ["a.py", "b.py"]
    a, b = ([cell["id"] for cell in json.loads(notebook(path))["cells"]] for path in sources(tmp_path))
    assert len(set(a)) == 2
    assert a == b[1:]


# ---- checks ----


@exercise("a number")
def exercise_0_1(answer):
    demand(to_number(answer) > 2, "larger")
    return "good"


def test_what_is_no_hook_is_told_from_hooks():
    hooks = {"blocks.0.attn.z": print}
    assert check_hooks(hooks) is hooks
    with pytest.raises(WrongAnswer, match=r"expected hooks, .* got the function 'print'$"):
        check_hooks(print)
    for answer in (-2, "attn.z"):
        with pytest.raises(WrongAnswer, match=rf"got {answer!r}$"):
            check_hooks(answer)


def test_an_answer_that_is_not_there_yet_is_asked_for():
    verdict = exercise_0_1(...)
    assert verdict.right is None
    assert "0.1" in repr(verdict)
    assert "in place of ... put a number" in repr(verdict)


def test_what_a_learner_writes_is_never_markup():
    shown = exercise_0_1("<img src=x onerror=run()>")._repr_html_()
    assert "&lt;img src=x onerror=run()&gt;" in shown
    assert "<img" not in shown


def test_right_wrong_and_senseless_answers_are_told_apart():
    assert exercise_0_1(3).right is True
    assert exercise_0_1(torch.tensor(3.0)).right is True
    assert (exercise_0_1(1).right, exercise_0_1(1).message) == (False, "larger")
    assert exercise_0_1("three").message == "expected one number, got 'three'"
    assert exercise_0_1(torch.zeros(2)).message == "expected one number, got a tensor of shape (2,)"
    assert exercise_0_1(print).message == "expected one number, got the function 'print' itself: call it"


def test_what_a_learners_function_raises_is_said_and_ends_nothing():
    @exercise("a function")
    def exercise_0_2(fn):
        return str(fn(0))

    verdict = exercise_0_2(lambda x: 1 / x)
    assert verdict.right is False
    assert verdict.message == "it raised ZeroDivisionError: division by zero"


def test_tensors_and_heads_are_compared_with_words():
    check_equal(torch.ones(2), torch.ones(2), "no")
    with pytest.raises(WrongAnswer, match=r"expected the shape \(2,\), got \(3,\)"):
        check_equal(torch.ones(3), torch.ones(2), "no")
    with pytest.raises(WrongAnswer, match=r"look at the norm .the largest difference is 1"):
        check_equal(torch.ones(2) * 2, torch.ones(2), "look at the norm")
    assert to_head([3, torch.tensor(4)]) == (3, 4)
    for answer, said in (
        ((4, 0), "no head 4.0: layers are 0 to 3, heads 0 to 7"),
        (3, "expected .layer, head., got 3"),
    ):
        with pytest.raises(WrongAnswer, match=said):
            to_head(answer)
    assert describe_answer([1]) == "[1]"


# ---- quotes ----


def test_a_quote_is_what_the_file_says():
    file = (ROOT / "glmlens" / "model.py").read_text().splitlines()
    for quote in (
        source(apply_rotary),
        source(RMSNorm),
        source(GLM.forward, "for i in layers", "resid = self.blocks[i]"),
    ):
        assert quote.file == "glmlens/model.py"
        said = [line.strip() for line in file[quote.first - 1 : quote.last]]
        assert [line.strip() for line in quote.text.splitlines()] == said
    assert source(Block.forward, "resid_pre = hook").text == 'resid_pre = hook("resid_pre", resid)'
    assert "```python\ndef apply_rotary(" in source(apply_rotary)._repr_markdown_()


def test_a_passage_that_is_gone_is_an_error():
    with pytest.raises(ValueError, match=r"no line of Block.forward contains 'resid_end'"):
        source(Block.forward, "resid_end")
