"""The command `glmlens`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from glmlens import lab
from glmlens.config import CheckpointError
from glmlens.demo import story
from glmlens.lens import load
from glmlens.storage import FileError, expand_path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="glmlens", description="Look inside GLM language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("demo", help="a prompt, the heads that its answer comes from, and a report")
    command.add_argument("--model", metavar="PATH", help="a checkpoint folder or hub id (default: the model inside)")
    command.add_argument("--prompt", default=story.DEMO_PROMPT)
    command.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: a temporary folder)")
    command.set_defaults(run=run_demo)
    command = commands.add_parser("lab", help="the tutorials and notebooks in a folder of yours, and JupyterLab there")
    command.epilog = "What stands after -- goes to jupyter lab as it is: glmlens lab FOLDER -- --allow-root"
    command.add_argument("folder", type=Path, nargs="?", default=Path("glmlens-lab"), metavar="FOLDER")
    command.add_argument("--copy-only", action="store_true", help="copy, and start nothing")
    command.add_argument("--no-browser", dest="browser", action="store_false", help="open no browser")
    command.add_argument("--port", type=int, help="the port that JupyterLab listens on")
    command.set_defaults(run=open_lab)
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given and given[0] == "lab" else len(given)
    args = parser.parse_args(given[:end])
    args.options = given[end + 1 :]
    try:
        args.run(args)
    except (CheckpointError, FileError, lab.LabError) as e:
        print(f"glmlens: {e}", file=sys.stderr)
        return 2
    return 0


def run_demo(args: argparse.Namespace) -> None:
    """Tell what a model says to a prompt, where that comes from, and what changing it does."""
    lens = load(args.model, dtype=None if args.model else "float32")
    out = None if args.out is None else make_folder(args.out)
    if lens.tokenizer is None and args.prompt != story.DEMO_PROMPT:
        raise CheckpointError(f"{args.model}: without a tokenizer there is nothing to read --prompt with")
    path = story.write_demo_report(lens, args.prompt, out)
    print(f"the report, with its figures: {path}")
    print("to go on, with the course and the benches: pip install jupyterlab && glmlens lab my-folder")


def make_folder(path: Path) -> Path:
    """Return a folder that is there, made if it was not. Raises FileError before anything is computed for it."""
    path = expand_path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FileError(f"{path}: {e.strerror or e}; give another folder") from e
    return path


def open_lab(args: argparse.Namespace) -> None:
    """Copy the tutorials and notebooks to a folder, and start JupyterLab there."""
    done = lab.copy_lab(args.folder)
    print(f"{expand_path(args.folder).resolve()}: {done}", flush=True)
    if not args.copy_only:
        lab.start_jupyterlab(args.folder, browser=args.browser, port=args.port, options=args.options)
