"""The page of all hook points, of the catalogue and of model.py: python -m tutorials.hook_points."""

import ast
import inspect
from pathlib import Path

import torch

from glmlens import GLM, GLMConfig, Lens, model
from glmlens.hook_points import ON_REQUEST, POINTS, ROOT_POINTS

PAGE = Path(__file__).parent / "hook_points.md"
SMALL = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 32,
}  # fmt: skip
KINDS = {  # a GLM of each kind, by what sets it apart from the first
    "": ("glm", "eager", 0.5),
    "`glm4`": ("glm4", "eager", 0.5),
    '`attention="sdpa"`': ("glm", "sdpa", 0.5),
    "every channel turns": ("glm", "eager", 1.0),
}
TEXT = """# All hook points

Every point there is, in the order in which it fires. A point is one line of `glmlens/model.py`,
`x = hook("name", expression)`: the last column is that expression as it stands there, and before it the line that made
what it names. `lens.points()` lists those of your model with their shapes and bytes. This page is written by
`python -m tutorials.hook_points`, and a test holds it against the code.

Axes: `pos` is the positions of this call, `key` all that it can attend to, `kv` the key-value heads, `rotated` and
`rest` the channels of a head that turn and that do not, `pair` two neighbours of those that turn.

## In every layer

Under `blocks.{{i}}.`: the first is `blocks.0.resid_pre`. A layer's own name alone means all layers.

{layer}

## Once in a run

`embed` is before all layers, the others are after them.

{root}

## Which models have them

Columns say what sets a model apart from an ordinary `glm` with eager attention, in which half of the channels turn.

{kinds}
"""


def kind(model_type: str, attention: str, turns: float) -> list[str]:
    """The points that a GLM of a kind has, as a layer says them, in the order in which they fire."""
    cfg = GLMConfig.from_dict({**SMALL, "model_type": model_type, "partial_rotary_factor": turns})
    with torch.device("meta"):
        names = [point.local for point in Lens(GLM(cfg, attention)).points()]
    return names


def expressions() -> dict[str, list[str]]:
    """What model.py hands to `hook` under every name, as it is written there, and the lines that this is made by."""
    text, found = inspect.getsource(model), {}
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    for function in sorted(functions, key=lambda node: node.lineno):
        for call in sorted(filter(hooked, ast.walk(function)), key=lambda node: (node.lineno, node.col_offset)):
            name, given = call.args[0].value, call.args[1]
            written = " ".join((ast.get_source_segment(text, given) or "").split())
            lines = [ast.get_source_segment(text, line) for line in makers(given, function)]
            found.setdefault(name, []).append("; ".join(f"`{line}`" for line in [*lines, written]))
    return found


def hooked(node: ast.AST) -> bool:
    """Whether this is `hook("name", expression)`."""
    match node:
        case ast.Call(func=ast.Name("hook"), args=[ast.Constant(str()), _]):
            return True
    return False


def makers(given: ast.expr, function: ast.FunctionDef) -> list[ast.Assign]:
    """Where an expression only names things or adds them up: the lines before it that made these things."""
    if not isinstance(given, ast.Name | ast.BinOp):
        return []
    names = {node.id for node in ast.walk(given) if isinstance(node, ast.Name)}
    lines = [node for node in ast.walk(function) if isinstance(node, ast.Assign) and node.lineno < given.lineno]
    last = {name: line for line in sorted(lines, key=lambda line: line.lineno) for name in assigned(line) & names}
    points = [line for line in last.values() if isinstance(line.value, ast.Call | ast.Tuple) and own(line.value)]
    return [line for line in dict.fromkeys(last.values()) if line not in points]


def own(value: ast.expr) -> bool:
    """Whether a value is that of points, which have rows of their own."""
    return all(map(hooked, value.elts)) if isinstance(value, ast.Tuple) else hooked(value)


def assigned(line: ast.Assign) -> set[str]:
    return {node.id for target in line.targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def row(name: str, said: dict[str, list[str]]) -> str:
    """A point's line of the table; a norm says "scale", and its layer or the model puts "ln1." before it."""
    axes, maths = POINTS[name]
    code = ", or ".join(said.get(name) or said[name.rpartition(".")[2]])
    return f"| `{name}` | {axes} | {maths} | {code} |"


def table(names: list[str]) -> str:
    said = expressions()
    rows = [row(name, said) for name in names]
    return "\n".join(["| point | axes | what it is | in model.py |", "|---|---|---|---|", *rows])


def kinds() -> str:
    """A table of the points that not every model has."""
    there = {words: kind(*how) for words, how in KINDS.items()}
    some = [name for name in POINTS if not all(name in names for names in there.values())]
    head = ["| point | " + " | ".join(words or "`glm`" for words in there) + " |", "|---" * (len(there) + 1) + "|"]
    rows = [
        f"| `{name}` | " + " | ".join("yes" if name in names else "no" for names in there.values()) + " |"
        for name in some
    ]
    only = ", ".join(f"`{name}`" for name in ON_REQUEST)
    return "\n".join([*head, *rows, "", f"All other points are in every model. Taken only when named in full: {only}."])


def page() -> str:
    """The text of the page."""
    layer = [name for name in POINTS if name not in ROOT_POINTS]
    return TEXT.format(layer=table(layer), root=table(list(ROOT_POINTS)), kinds=kinds())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
