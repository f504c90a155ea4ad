"""The workbenches: each runs as it is, with another model by one line, and with parameters from outside."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from conftest import rewrite_json, write_checkpoint
from study import run

import glmlens
from glmlens.lens import BUNDLED_MODEL
from glmlens.widgets import Explorer
from tutorials.build import notebook, sources

ROOT = Path(__file__).parents[1]
WORKBENCHES = sources(ROOT / "notebooks")
each = pytest.mark.parametrize("path", WORKBENCHES, ids=lambda path: path.stem)
EXPECTED = "patching attribution rotary kv_cache generation compare_models attention_heads".split()
EXPLORERS = {
    "attention_heads": ["AttentionExplorer"],
    "patching": ["PatchExplorer"],
    "rotary": ["RotaryExplorer"],
    "kv_cache": ["CacheInspector"],
    "generation": ["GenerationExplorer"],
}
OTHER = {  # what is set from outside: the prompts of a stranger's model, and less of everything
    "attention_heads": {"head": [1, 2]},
    "patching": {
        "clean": "Anna and Tom went home, Tom", "corrupt": "Anna and Tom went home, Anna", "answers": [" gave", " was"],
    },
    "attribution": {"edges": False},
    "rotary": {"head": [0, 3], "query": 2},
    "kv_cache": {"layer": 0},
    "generation": {"length": 4, "head": [0, 1], "step": 1},
    "compare_models": {"ablated": [[0, 0]], "length": 3},
}  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_workbench(path, **parameters):
    """Run a workbench in order; return its variables, its figures and the seconds of this process that it took.

    Parameters are set as papermill does it, in a cell of their own after the one that is tagged.
    """
    world, shown, began = {"__name__": "__main__"}, [], time.process_time()
    for i, cell in enumerate(json.loads(path.with_suffix(".ipynb").read_text())["cells"]):
        if cell["cell_type"] == "code":
            shown.append(run("".join(cell["source"]), world, f"<{path.stem} cell {i}>")[0])
            if "parameters" in cell["metadata"].get("tags", ()):
                assert set(parameters) <= set(world), "no such parameter"
                world.update(parameters)
    seconds = time.process_time() - began
    explorers = [value for value in shown if isinstance(value, Explorer)]
    for explorer in explorers:
        explorer.close()
    assert [type(explorer).__name__ for explorer in explorers] == EXPLORERS.get(path.stem, [])
    return world, [value for value in shown if hasattr(value, "to_plotly_json")], seconds


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Write a glm4 with random weights, another shape and the tokenizer of the small GLM; return its folder."""
    folder, cfg = tmp_path_factory.mktemp("stranger"), glmlens.load().cfg
    shape = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
    write_checkpoint(folder, 5, glm4=True, vocab_size=cfg.d_vocab, tie_word_embeddings=False, **shape)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (BUNDLED_MODEL / file).exists():
            shutil.copy(BUNDLED_MODEL / file, folder)
    rewrite_json(folder / "config.json", eos_token_id=[1])
    return str(folder)


def test_every_workbench_is_there():
    assert sorted(path.stem for path in WORKBENCHES) == sorted(EXPECTED)
    index = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\w+)\.ipynb\)", index) == ["attention_heads", *EXPECTED[:-1]]


@each
def test_a_workbench_runs_as_it_is(path):
    world, figures, seconds = run_workbench(path)
    assert world["model"] is None
    assert len(figures) >= 4
    assert seconds < 20


@each
def test_another_checkpoint_is_one_line_and_parameters_are_set_from_outside(path, stranger):
    world, figures, _ = run_workbench(path, model=stranger, **OTHER[path.stem])
    lens = world["lens"]
    assert (lens.cfg.n_layers, lens.cfg.n_heads, lens.cfg.sandwich) == (2, 6, True)
    assert len(figures) >= 3


@each
def test_the_first_cell_of_code_is_parameters_alone(path):
    cells = [
        cell for cell in json.loads(path.with_suffix(".ipynb").read_text())["cells"] if cell["cell_type"] == "code"
    ]
    tagged = [i for i, cell in enumerate(cells) if cell["metadata"].get("tags") == ["parameters"]]
    assert tagged == [0]
    world = {}
    exec("".join(cells[0]["source"]), world)
    del world["__builtins__"]
    assert {"model", "dtype", "device"} <= set(world)
    assert json.loads(json.dumps(world)) == {k: list(v) if isinstance(v, tuple) else v for k, v in world.items()}


def test_only_tags_of_a_cell_are_stored(tmp_path):
    (tmp_path / "a.py").write_text('# %% tags=["parameters"] collapsed=true\nx = 1\n\n# %%\nx\n')
    first, second = json.loads(notebook(tmp_path / "a.py"))["cells"]
    assert (first["metadata"], second["metadata"]) == ({"tags": ["parameters"]}, {})
