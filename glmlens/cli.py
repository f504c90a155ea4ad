"""The command line: `glmlens demo` and `glmlens lab`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from glmlens import lab_command
from glmlens.config import CheckpointError
from glmlens.demo import story
from glmlens.file_io import FileError, expand_path
from glmlens.lens import load


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit status: 0, or 2 for an error that is printed in one line."""
    parser = argparse.ArgumentParser(prog="glmlens", description="Look inside GLM language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("demo", help="examine a model on a few prompts, and write a report with figures")
    command.add_argument("--model", metavar="PATH", help="a checkpoint folder or hub id (default: the bundled model)")
    command.add_argument("--prompt", default=story.DEMO_PROMPT, help="the prompt to continue (default: %(default)s)")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="the folder for the report (default: a temporary folder)"
    )
    command.set_defaults(run=run_demo)
    command = commands.add_parser("lab", help="copy the tutorials and notebooks to a folder, and open JupyterLab there")
    command.epilog = "Arguments after -- are passed to jupyter lab: glmlens lab FOLDER -- --allow-root"
    command.add_argument("folder", type=Path, nargs="?", default=Path("glmlens-lab"), metavar="FOLDER")
    command.add_argument("--copy-only", action="store_true", help="copy the files without starting JupyterLab")
    command.add_argument(
        "--no-browser", dest="browser", action="store_false", help="start JupyterLab without opening a browser"
    )
    command.add_argument("--port", type=int, help="the port of JupyterLab")
    command.set_defaults(run=open_lab)
    words = list(sys.argv[1:] if arguments is None else arguments)
    # argparse would drop "--": split off the options of JupyterLab before.
    end = words.index("--") if "--" in words and words[0] == "lab" else len(words)
    args = parser.parse_args(words[:end])
    args.options = words[end + 1 :]
    try:
        args.run(args)
    except (CheckpointError, FileError, lab_command.LabError) as e:
        print(f"glmlens: {e}", file=sys.stderr)
        return 2
    return 0


def run_demo(args: argparse.Namespace) -> None:
    """Examine a model, print the findings and write the report."""
    lens = load(args.model, dtype=None if args.model else "float32")
    out = None if args.out is None else make_folder(args.out)  # fails before minutes of computing, not after
    if lens.tokenizer is None and args.prompt != story.DEMO_PROMPT:
        raise CheckpointError(f"{args.model}: has no tokenizer, so --prompt cannot be used: leave it out")
    path = story.write_demo_report(lens, args.prompt, out)
    print(f"Report with all figures: {path}")
    print("Next, the tutorials and notebooks: pip install jupyterlab && glmlens lab my-folder")


def make_folder(path: Path) -> Path:
    """Create a folder if it does not exist; return its path. Raises FileError if it cannot be created."""
    path = expand_path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise FileError(f"{path}: {e.strerror or e}; give another folder") from e
    return path


def open_lab(args: argparse.Namespace) -> None:
    """Copy the tutorials and notebooks to a folder, and start JupyterLab there."""
    report = lab_command.copy_lab(args.folder)
    print(f"{expand_path(args.folder).resolve()}: {report}", flush=True)
    if not args.copy_only:
        lab_command.start_jupyterlab(args.folder, browser=args.browser, port=args.port, options=args.options)
