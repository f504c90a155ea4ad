"""ARCHITECTURE.md is true: its modules exist, its tree of errors is the package's, its glossary is short."""

import builtins
import importlib
import pkgutil
import re
from pathlib import Path

import glmlens
from glmlens import GlmlensError

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
TREE = TEXT.split("```text\n")[1].split("```")[0].splitlines()
SIGNALS = {"ForwardStopped", "CapturedValue", "Stopped"}


def own_exceptions():
    """Every exception class of the package by its name; all modules are imported first."""
    for module in pkgutil.walk_packages(glmlens.__path__, "glmlens."):
        importlib.import_module(module.name)
    found, queue = {}, [BaseException]
    while queue:
        subclasses = queue.pop().__subclasses__()
        queue += subclasses
        found |= {cls.__name__: cls for cls in subclasses if cls.__module__.split(".")[0] == "glmlens"}
    return found


def printed_tree():
    """The bases of each class as the tree prints them: the class above it, then the builtin in parentheses."""
    bases, above = {"GlmlensError": ("Exception",)}, ["GlmlensError"]
    for line in TREE[1:]:
        indent, name, builtin = re.match(r"((?:│   |    )*)[├└]── (\w+)(?: \((\w+)\))?", line).groups()
        depth = len(indent) // 4 + 1
        bases[name] = (above[depth - 1], *([builtin] if builtin else []))
        above[depth:] = [name]
    return bases


def test_every_error_derives_from_one_base_and_stands_in_the_tree_with_its_bases():
    exceptions = own_exceptions()
    errors = {name: cls for name, cls in exceptions.items() if name not in SIGNALS}
    assert [name for name, cls in errors.items() if not issubclass(cls, GlmlensError)] == []
    assert printed_tree() == {name: tuple(base.__name__ for base in cls.__bases__) for name, cls in errors.items()}


def test_signals_are_no_errors_and_are_named():
    exceptions = own_exceptions()
    for name in SIGNALS:
        assert not issubclass(exceptions[name], GlmlensError)
        assert f"`{name}`" in TEXT


def test_every_module_that_is_named_exists():
    package = ROOT / "glmlens"
    rows = re.findall(r"^\| \w+ \| (`.+?`) \|", TEXT.split("## How")[0], re.MULTILINE)
    paragraph = TEXT.split("## How")[0].split("\n\n")[-2]
    names = re.findall(r"`(\w+)`", " ".join(rows) + paragraph) + re.findall(r"`(\w+\.\w+)`", TEXT.split("| layer")[0])
    assert len(names) >= 30
    for name in names:
        path = package / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), name
    for path in re.findall(r"`(\w+/\w+\.py)`", TEXT):
        assert (ROOT / path).exists() or (package / path).exists(), path


def test_every_class_that_is_named_exists():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "glmlens").rglob("*.py"))
    for name in re.findall(r"`((?:[A-Z]+[a-z]+)+)`", TEXT):
        assert hasattr(builtins, name) or f"class {name}" in source, name


def test_the_glossary_has_at_most_thirty_words_each_once():
    rows = [line.split("|")[1].strip() for line in TEXT.split("## Glossary")[1].splitlines() if line.startswith("| ")]
    assert rows[0] == "here"
    assert 15 <= len(rows) - 1 <= 30
    assert len(set(rows)) == len(rows)
