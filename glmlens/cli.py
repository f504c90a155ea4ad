"""The command `glmlens`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from glmlens.config import CheckpointError
from glmlens.demo import story
from glmlens.lens import load


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="glmlens", description="Look inside GLM language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("demo", help="a prompt, the heads that its answer comes from, and a report")
    command.add_argument("--model", metavar="PATH", help="a checkpoint folder or hub id (default: the model inside)")
    command.add_argument("--prompt", default=story.PROMPT)
    command.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: a temporary folder)")
    command.set_defaults(run=demo)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except CheckpointError as e:
        print(f"glmlens: {e}", file=sys.stderr)
        return 2
    return 0


def demo(args: argparse.Namespace) -> None:
    """Tell what a model says to a prompt, where that comes from, and what changing it does."""
    lens = load(args.model, dtype=None if args.model else "float32")
    if lens.tokenizer is None and args.prompt != story.PROMPT:
        raise CheckpointError(f"{args.model}: without a tokenizer there is nothing to read --prompt with")
    path = story.tell(lens, args.prompt, args.out)
    print(f"the report, with its figures: {path}")
    print("to go on in a notebook: pip install jupyterlab && jupyter lab")
    print("and in its first cell: import glmlens; lens = glmlens.load()")
