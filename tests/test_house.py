"""The house: its layers, its size, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import glmlens

PACKAGE = Path(glmlens.__file__).parent
ORDER = """
errors deprecated storage integers keywords child hooks config hub results tables kv_cache rope model losses angles
formats checkpoint generate tokenizer chat prompt_kinds conversation prompt
derive activations record check run weights splice running harvest saving lens
cache.places cache.change cache.move cache.drop cache.graft cache
tasks.words tasks.task tasks.language tasks.formal tasks
analysis.rows analysis.pattern analysis.logit_lens analysis.residual analysis.parts analysis.attribution
analysis.factored analysis.circuits analysis.heads analysis.passes analysis.rotary analysis.distance
analysis.entries analysis.leave_out
analysis.probes analysis.selfcheck analysis
patch.sites patch.keys patch.changes patch.interventions patch.running patch.metrics patch.waves patch.engine
patch.evaluate patch.store patch.grid patch.sweep
patch.worlds patch.steer patch.gradients patch.graph patch.edges patch.attribute
patch.paths patch.circuits patch.rotary patch.moments patch.timeline patch
plot.style plot.data plot.heatmaps plot.heads plot.bars plot.lines plot.rotary plot.entries plot.timeline
plot.graph plot.tokens plot page
widgets.own widgets.chart widgets.base widgets.heads widgets.attention widgets.patching
widgets.runs widgets.cache widgets.rotary widgets.generation widgets
demo.world demo.vocabulary demo.train demo.circuits demo.history demo.card demo.story
course.quote course course.verdict lab cli
""".split()
ORDER += sorted(f"course.{path.stem}" for path in PACKAGE.glob("course/check_*.py"))  # a tutorial brings its own
ALONE = ["errors", "deprecated", "storage", "integers", "child", "keywords", "prompt_kinds"]  # import nothing of ours
LOW = ["config", "hooks", "results", "tokenizer", "chat", "page", "lab", "tasks.words"]  # rest on those alone


def modules():
    """Every module of the package and its file; a package by its name alone."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if path.read_text().strip() and name != "__init__":
            found[name] = path
    return found


def imports(path):
    """The modules of this package that a file imports, and those of them that an import in a function hides."""
    tree = ast.parse(path.read_text())
    found, hidden = set(), set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "glmlens":
            inside = node.module.removeprefix("glmlens").lstrip(".")
            spelt = [".".join(filter(None, [inside, alias.name])) for alias in node.names]
            names = [name if name in ORDER else inside for name in spelt]
        elif isinstance(node, ast.Import):
            names = [a.name.removeprefix("glmlens.") for a in node.names if a.name.startswith("glmlens.")]
        found.update(names)
        if node not in tree.body:
            hidden.update(names)
    return found, hidden


def test_imports_point_only_downwards():
    assert sorted(modules()) == sorted(ORDER)
    for module, path in modules().items():
        found, hidden = imports(path)
        above = [name for name in found if ORDER.index(name) >= ORDER.index(module)]
        assert not above, f"{module} imports {above}"
        assert not hidden - {"plot", "page"}, f"{module} hides imports of {hidden} in a function"


def test_the_bottom_rests_on_nothing_of_ours():
    for module in ALONE:
        assert imports(modules()[module])[0] == set(), module
    for module in LOW:
        assert imports(modules()[module])[0] <= set(ALONE), module


def test_plots_know_of_results_and_of_nothing_else_of_ours():
    for module, path in modules().items():
        if module.split(".")[0] == "plot":
            assert {name for name in imports(path)[0] if name.split(".")[0] != "plot"} <= {"results", "integers"}, (
                module
            )


def test_the_model_can_be_read_in_one_sitting():
    assert len((PACKAGE / "model.py").read_text().splitlines()) <= 350


def test_no_module_is_long():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, path


HEAVY = ["transformers", "plotly", "ipywidgets", "pandas", "matplotlib", "huggingface_hub", "sympy", "torch._dynamo"]


def test_importing_loads_nothing_heavy():
    code = f"import sys, glmlens; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_documented():
    for name in set(glmlens.__all__) - {"Hook"}:
        assert getattr(glmlens, name).__doc__, name


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["pyright"]], ids=" ".join)
def test_the_code_is_clean(command):
    root = PACKAGE.parent
    if not (root / "pyproject.toml").exists():
        pytest.skip("not a checkout")
    done = subprocess.run([sys.executable, "-m", *command], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
