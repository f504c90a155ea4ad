"""Works through notebooks as a learner would: python -W error tests/study.py NOTEBOOK [PAGE.html].

Cell by cell, in one world, with the answers left as they are. At every exercise the hidden solution and the hidden
wrong turns are tried too, each in a world of its own. Says in JSON what came of it; PAGE is all of it, to look at.
With --apart before them any number of notebooks, each in a process of its own and in its own folder; what all of them
need is imported once.
"""

import ast
import contextlib
import io
import json
import linecache
import multiprocessing
import os
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


def timed(notebook):
    found, page = study(notebook)
    return {**found, "seconds": time.process_time()}, page  # of work: this machine may have other things to do


def report(notebook, out):
    os.chdir(notebook.parent)
    try:
        out.send(timed(notebook)[0])
    except Exception:
        out.send({"error": traceback.format_exc()})  # knows the lines of cells


def apart(notebook):
    """What `study` finds in a process of its own, a copy of this one; or the error that ended it."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=report, args=(notebook, theirs))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return {"error": "its process was ended"}
    finally:
        child.join()


def warm():
    """Import what every notebook needs: a first recording has torch import its compiler."""
    from tqdm import tqdm

    import glmlens
    from glmlens import analysis, plot

    tqdm.monitor_interval = 0  # no thread: a process that has some should not be copied
    plot.residual_norms(analysis.accumulated_residual(glmlens.load(dtype="float32"), "Mary"))


def main(notebook, *more):
    sys.stdout.reconfigure(encoding="utf-8")
    if notebook == "--apart":
        warm()
        found = {Path(path).stem: apart(Path(path).resolve()) for path in more}
    else:
        found, parts = timed(Path(notebook))
        if more:
            from glmlens import save_html

            save_html(more[0], Path(notebook).stem, parts)
    print(json.dumps(found, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception:
        traceback.print_exc()  # knows the lines of cells
        sys.exit(1)
