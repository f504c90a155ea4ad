"""The house: its layers, its size, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import glmlens

PACKAGE = Path(glmlens.__file__).parent
ORDER = [
    "hooks", "config", "kv_cache", "model", "checkpoint", "generate", "tokenizer", "chat", "record", "check", "run",
    "weights",
    "lens", "cli",
]  # fmt: skip


def imports(path):
    """The modules of this package that a file imports, and whether any import of them hides in a function."""
    tree = ast.parse(path.read_text())
    found, hidden = set(), set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "glmlens":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("glmlens.")]
        found.update(names)
        if node not in tree.body:
            hidden.update(names)
    return found, hidden


def test_imports_point_only_downwards():
    modules = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
    assert modules == sorted(ORDER)
    for module in modules:
        found, hidden = imports(PACKAGE / f"{module}.py")
        above = [name for name in found if ORDER.index(name) >= ORDER.index(module)]
        assert not above, f"{module} imports {above}"
        assert not hidden, f"{module} hides imports of {hidden} in a function"


def test_the_bottom_rests_on_nothing_of_ours():
    for module in ("hooks", "config", "tokenizer", "chat"):
        assert imports(PACKAGE / f"{module}.py")[0] == set()


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
