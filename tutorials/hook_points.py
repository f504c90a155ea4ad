"""Write the page of all hook points from the catalogue and model.py: python -m tutorials.hook_points."""

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
KINDS = {  # the columns of the last table: model type, attention, fraction of rotated channels
    "": ("glm", "eager", 0.5),
    "`glm4`": ("glm4", "eager", 0.5),
    '`attention="sdpa"`': ("glm", "sdpa", 0.5),
    "all channels rotated": ("glm", "eager", 1.0),
}
TEXT = """# All hook points

All hook points, in the order in which they fire. A point is one line of `glmlens/model.py`,
`x = hook("name", expression)`: the last column is that expression, and before it the lines that compute what it names.
`lens.points()` lists the points of your model with their shapes and bytes. This page is written by
`python -m tutorials.hook_points`, and a test compares it with the code.

Axes: `pos` is the positions of this call, `key` all keys that it can attend to, `kv` the KV heads, `rotated` and `rest`
the channels of a head that are rotated and those that are not, `pair` the pairs of adjacent rotated channels.

## In every layer

Their names begin with `blocks.{{i}}.`: the first is `blocks.0.resid_pre`. The name without that means all layers.

{layer}

## Once in a run

`embed` fires before all layers, the others after them.

{root}

## Which models have them

The first column is a `glm` with eager attention and half of the channels rotated; the others differ from it in one way.

{kinds}
"""


def list_points(model_type: str, attention: str, rotary_factor: float) -> list[str]:
    """Return the layer-local names of the points of such a GLM, in the order in which they fire."""
    cfg = GLMConfig.from_dict({**SMALL, "model_type": model_type, "partial_rotary_factor": rotary_factor})
    with torch.device("meta"):
        names = [point.local for point in Lens(GLM(cfg, attention)).points()]
    return names


def find_expressions() -> dict[str, list[str]]:
    """Return, for every name, the expressions that model.py passes to `hook`, after the lines that compute them."""
    text = inspect.getsource(model)
    expressions: dict[str, list[str]] = {}
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    for function in sorted(functions, key=lambda node: node.lineno):
        for call in sorted(filter(is_hook_call, ast.walk(function)), key=lambda node: (node.lineno, node.col_offset)):
            name = call.args[0].value
            expression = call.args[1]
            code = " ".join((ast.get_source_segment(text, expression) or "").split())
            lines = [ast.get_source_segment(text, line) for line in find_defining_lines(expression, function)]
            expressions.setdefault(name, []).append("; ".join(f"`{line}`" for line in [*lines, code]))
    return expressions


def is_hook_call(node: ast.AST) -> bool:
    """Whether `node` is `hook("name", expression)`."""
    match node:
        case ast.Call(func=ast.Name("hook"), args=[ast.Constant(str()), _]):
            return True
    return False


def find_defining_lines(expression: ast.expr, function: ast.FunctionDef) -> list[ast.Assign]:
    """Return the assignments of the variables in an expression that is a variable or a sum; none for other expressions.

    Variables that are hook points are left out: they have rows of their own.
    """
    if not isinstance(expression, ast.Name | ast.BinOp):
        return []
    names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
    lines = [node for node in ast.walk(function) if isinstance(node, ast.Assign) and node.lineno < expression.lineno]
    # Of several assignments to a variable the last before the expression counts.
    last = {name: line for line in sorted(lines, key=lambda line: line.lineno) for name in list_targets(line) & names}
    points = [line for line in last.values() if isinstance(line.value, ast.Call | ast.Tuple) and is_point(line.value)]
    return [line for line in dict.fromkeys(last.values()) if line not in points]


def is_point(value: ast.expr) -> bool:
    """Whether a value is a call of `hook`, or a tuple of such calls."""
    return all(map(is_hook_call, value.elts)) if isinstance(value, ast.Tuple) else is_hook_call(value)


def list_targets(line: ast.Assign) -> set[str]:
    """Return the names that an assignment assigns to."""
    return {node.id for target in line.targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def format_row(name: str, expressions: dict[str, list[str]]) -> str:
    """Return a point's row of a table. In a norm's code "ln1.scale" is "scale": its scope adds "ln1."."""
    axes, maths = POINTS[name]
    code = ", or ".join(expressions.get(name) or expressions[name.rpartition(".")[2]])
    return f"| `{name}` | {axes} | {maths} | {code} |"


def format_points(names: list[str]) -> str:
    """Return a table of points."""
    expressions = find_expressions()
    rows = [format_row(name, expressions) for name in names]
    return "\n".join(["| point | axes | what it is | in model.py |", "|---|---|---|---|", *rows])


def format_kinds() -> str:
    """Return a table of the points that not every model has."""
    points = {title: list_points(*options) for title, options in KINDS.items()}
    optional = [name for name in POINTS if not all(name in names for names in points.values())]
    titles = " | ".join(title or "`glm`" for title in points)
    head = [f"| point | {titles} |", "|---" * (len(points) + 1) + "|"]
    rows = [
        f"| `{name}` | " + " | ".join("yes" if name in names else "no" for names in points.values()) + " |"
        for name in optional
    ]
    only = ", ".join(f"`{name}`" for name in ON_REQUEST)
    return "\n".join(
        [*head, *rows, "", f"All other points are in every model. Computed only when requested by name: {only}."]
    )


def make_page() -> str:
    """Return the text of the page."""
    layer = [name for name in POINTS if name not in ROOT_POINTS]
    return TEXT.format(layer=format_points(layer), root=format_points(list(ROOT_POINTS)), kinds=format_kinds())


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
    print(PAGE)
