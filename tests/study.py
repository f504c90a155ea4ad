"""Run notebooks as a learner would: python -W error tests/study.py NOTEBOOK [PAGE.html].

All cells run in one namespace, with the answers left as they are. At every exercise the hidden solution and the hidden
wrong answers are run too, each in a copy of the namespace. The verdicts are printed as JSON; PAGE shows all outputs.
With --apart, any number of notebooks run, each in a process of its own and in its own folder; what all of them need is
imported once.
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
    """Run code and display its last expression as a notebook does; return the value of that and the printed text."""
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


def find_check(code):
    """Return the call of a check at the end of a cell, "check.exercise_3_1(answer)", or None."""
    last = code.strip().splitlines()[-1] if code.strip() else ""
    return last if re.fullmatch(r"check\.exercise_\w+\(.*\)", last) else None


def find_hidden_answers(cells, i):
    """Return titles and code of the hidden solutions and wrong answers in the text after a cell."""
    text = cells[i + 1]["source"] if i + 1 < len(cells) and cells[i + 1]["cell_type"] == "markdown" else ""
    return [(title, "\n".join(CODE.findall(body))) for title, body in FOLDED.findall(text)]


def study(notebook):
    """Run a notebook; return the verdicts of its exercises with the number of figures, and all it shows."""
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
        if check := find_check(code):
            verdicts = exercises[check.split(".")[1].split("(")[0]] = {"untouched": [value.right], "said": []}
            for title, answer in find_hidden_answers(cells, i):
                verdict, _ = run(f"{answer}\n{check}", dict(world), f"<{notebook.stem} cell {i}: {title}>")
                verdicts.setdefault(title.split(":")[0].lower(), []).append(verdict.right)
                verdicts["said"].append(repr(verdict))
                page.append(verdict)
    return {"exercises": exercises, "figures": figures}, page


def study_timed(notebook):
    """Run a notebook, and add the CPU seconds: unlike wall time, they do not depend on the load of the machine."""
    result, page = study(notebook)
    return {**result, "seconds": time.process_time()}, page


def report(notebook, out):
    """Run a notebook in its folder, and send the result, or the error, through a pipe."""
    os.chdir(notebook.parent)
    try:
        out.send(study_timed(notebook)[0])
    except Exception:
        out.send({"error": traceback.format_exc()})  # with the lines of cells


def study_in_fork(notebook):
    """Return the result of `study` in a fork of this process, or the error that ended it."""
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


def import_shared_modules():
    """Import what every notebook needs. A first recording makes torch import its compiler."""
    from tqdm import tqdm

    import glmlens
    from glmlens import analysis, plot

    tqdm.monitor_interval = 0  # no thread: a process with threads should not be forked
    plot.residual_norms(analysis.accumulated_residual(glmlens.load(dtype="float32"), "Mary"))


def main(notebook, *more):
    sys.stdout.reconfigure(encoding="utf-8")
    if notebook == "--apart":
        import_shared_modules()
        result = {Path(path).stem: study_in_fork(Path(path).resolve()) for path in more}
    else:
        result, parts = study_timed(Path(notebook))
        if more:
            from glmlens import save_html

            save_html(more[0], Path(notebook).stem, parts)
    print(json.dumps(result, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception:
        traceback.print_exc()  # with the lines of cells
        sys.exit(1)
