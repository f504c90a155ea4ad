"""The house: its layers, its size, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import glmlens

PACKAGE = Path(glmlens.__file__).parent
ORDER = """
errors deprecated dtypes file_io integers foreign_keywords loading text recording text.sandbox_process hook_points
hooks config loading.hub results text_tables kv_cache rotary_frequencies model losses rotary_rules loading.formats
loading.checkpoint lens.sampling text.tokenizer text.chat text.prompt_kinds text.conversation text.prompts
recording.derive recording.run_info recording.saved_activations recording.activations recording.recorder
recording.run_check lens.generation lens.weights recording.sparse_dictionaries lens.forward recording.harvest
loading.saving lens.lens lens cache.selection cache.edit cache.move cache.evict cache.graft cache tasks.words
tasks.task tasks.language tasks.formal tasks analysis.prompt_batch analysis.attention analysis.layer_norms
analysis.logit_lens analysis.residual analysis.components analysis.logit_attribution analysis.factored
analysis.qk_ov_circuits analysis.heads analysis.chunked_runs analysis.rotary analysis.attention_distance
analysis.cache_reads analysis.leave_one_out analysis.probes analysis.selfcheck analysis patch.sites
patch.sweep_checkpoint_keys patch.replacement_values patch.interventions patch.apply patch.metrics patch.pairs
patch.packing patch.packed_runs patch.evaluate patch.sweep_checkpoints patch.sweep_axes patch.sweep
patch.side_by_side patch.steering_vectors patch.gradients patch.attribution_patching patch.rotary patch
circuits.graph circuits.edge_attribution circuits.circuit circuits.path_patching circuits timeline.recorder
timeline.pickling timeline.timeline timeline plot.style plot.arrays plot.heatmaps plot.heads plot.bars plot.lines
plot.rotary plot.cache plot.timeline plot.circuit plot.tokens plot html_report widgets.anywidget_base widgets.chart
widgets.base widgets.heads widgets.attention widgets.patching widgets.generation_runs widgets.cache widgets.rotary
widgets.generation widgets demo.world demo.vocabulary demo.train demo.circuits demo.history demo.card demo.story
course.quote_source course course.feedback lab_command cli
""".split()
ORDER += sorted(f"course.{path.stem}" for path in PACKAGE.glob("course/check_*.py"))  # a tutorial brings its own
ALONE = [
    "errors",
    "deprecated",
    "dtypes",
    "integers",
    "foreign_keywords",
    "text.prompt_kinds",
]  # import nothing of ours
LOW = """
file_io config hook_points hooks results text.sandbox_process text.tokenizer text.chat html_report lab_command
tasks.words
""".split()  # rest on those, and on each other, alone


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
        assert not hidden - {"plot", "html_report"}, f"{module} hides imports of {hidden} in a function"


def test_the_bottom_rests_on_nothing_of_ours():
    for module in ALONE:
        assert imports(modules()[module])[0] == set(), module
    for module in LOW:
        assert imports(modules()[module])[0] <= {*ALONE, *LOW}, module


def test_plots_know_of_results_and_of_nothing_else_of_ours():
    for module, path in modules().items():
        if module.split(".")[0] == "plot":
            assert {name for name in imports(path)[0] if name.split(".")[0] != "plot"} <= {
                "deprecated",
                "integers",
                "results",
            }, module


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
