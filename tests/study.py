"""Works through a notebook as a learner would: python -W error tests/study.py NOTEBOOK [PAGE.html].

Cell by cell, in one world, with the answers left as they are. At every exercise the hidden solution and the hidden
wrong turns are tried too, each in a world of its own. Says in JSON what came of it; PAGE is all of it, to look at.
"""

import ast
import contextlib
import io
import json
import linecache
import re
import sys
import time
import traceback
from pathlib import Path

FOLDED = re.compile(r"<details>\s*<summary>(.*?)</summary>(.*?)</details>", re.DOTALL)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def run(code, world, name):
    """Run code, and show what its last expression gives as a notebook would; what it was, and what was printed."""
    linecache.cache[name] = (len(code), None, code.splitlines(True), name)
    tree, value = ast.parse(code, name), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, name, "exec"), world)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), world)
        for shown in ("__repr__", "_repr_html_", "_repr_markdown_"):
            if value is not None and not hasattr(value, "to_plotly_json"):
                getattr(value, shown, str)()
    return value, printed.getvalue()


def asked(code):
    """The call of a check at the end of a cell, "check.exercise_3_1(answer)", or None."""
    last = code.strip().splitlines()[-1] if code.strip() else ""
    return last if re.fullmatch(r"check\.exercise_\w+\(.*\)", last) else None


def folded(cells, i):
    """The code of the hidden solutions and wrong turns in the text after a cell, by what they are called."""
    text = cells[i + 1]["source"] if i + 1 < len(cells) and cells[i + 1]["cell_type"] == "markdown" else ""
    return [(title, "\n".join(CODE.findall(body))) for title, body in FOLDED.findall(text)]


def study(notebook):
    """Everything that a notebook does: its exercises, and what it shows."""
    cells = [{**cell, "source": "".join(cell["source"])} for cell in json.loads(notebook.read_text())["cells"]]
    world, exercises, page, figures = {"__name__": "__main__"}, {}, [], 0
    for i, cell in enumerate(cells):
        code = cell["source"]
        page.append(code)
        if cell["cell_type"] == "markdown":
            continue
        value, printed = run(code, world, f"<{notebook.stem} cell {i}>")
        figures += hasattr(value, "to_plotly_json")
        page += [part for part in (printed, value) if part is not None and not (isinstance(part, str) and part == "")]
        if check := asked(code):
            found = exercises[check.split(".")[1].split("(")[0]] = {"untouched": [value.right], "said": []}
            for title, answer in folded(cells, i):
                verdict, _ = run(f"{answer}\n{check}", dict(world), f"<{notebook.stem} cell {i}: {title}>")
                found.setdefault(title.split(":")[0].lower(), []).append(verdict.right)
                found["said"].append(repr(verdict))
                page.append(verdict)
    return {"exercises": exercises, "figures": figures}, page


def main(notebook, page=None):
    sys.stdout.reconfigure(encoding="utf-8")
    found, parts = study(Path(notebook))
    found["seconds"] = time.process_time()  # of work: this machine may have other things to do
    if page:
        from glmlens import save_html

        save_html(page, Path(notebook).stem, parts)
    print(json.dumps(found, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception:
        traceback.print_exc()  # knows the lines of cells
        sys.exit(1)
