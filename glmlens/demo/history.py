"""Measure how the circuits of the small GLM form in training: `python -m glmlens.demo.history OUT`.

OUT is the folder of a training. It has a checkpoint folder for every hundredth step, which opens like any other:
`glmlens.load("OUT/step-0900")`.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from glmlens.config import CheckpointError
from glmlens.demo.circuits import RepeatedPrompts
from glmlens.file_io import expand_path
from glmlens.lens import Lens, load
from glmlens.results import Labelled
from glmlens.tasks import TASKS
from glmlens.text_tables import format_table

HISTORY_MEASURES = ("repeated words", "previous-token head", "induction head", "ioi accuracy", "ioi difference")


def measure_history(out: Path) -> Labelled:
    """Return measurements of the checkpoint of every saved step [step, measure].

    They are the accuracy on repeated words, the scores of the best previous-token and induction heads, and accuracy
    and logit difference of indirect object identification. Raises CheckpointError for a folder without checkpoints.
    """
    folders = sorted(out.glob("step-*"))
    if not folders:
        raise CheckpointError(f"{out} holds no checkpoints of a training: run python -m glmlens.demo.train {out}")
    rows = [measure_checkpoint(load(folder, dtype="float32")) for folder in tqdm(folders, desc="measuring")]
    # The step is in the name of the folder: step-0900.
    labels = {"step": [str(int(folder.name.split("-")[1])) for folder in folders], "measure": HISTORY_MEASURES}
    about = {"metric": "shares, attention and logits, as named", "positions": "40 rows of 20 words; 100 sentences"}
    return Labelled(values=np.array(rows), axes=("step", "measure"), labels=labels, about=about)


def measure_checkpoint(lens: Lens) -> tuple[float, ...]:
    """Return the measurements of one model, in the order of HISTORY_MEASURES."""
    repeats = RepeatedPrompts.draw(lens)
    examples = TASKS["ioi"].examples(lens, 100, "history")
    previous, induction = repeats.measure_attention(lens)
    logits = lens(examples, logits_to_keep=1)
    return (
        repeats.measure_accuracy(lens(repeats.tokens)),
        float(previous.max()),
        float(induction.max()),
        examples.accuracy(logits),
        float(examples.measure(logits).mean()),
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder of the training")
    history = measure_history(expand_path(parser.parse_args().out))
    steps = history.labels["step"]
    rows = [(step, *(f"{x:.2f}" for x in row)) for step, row in zip(steps, history.values, strict=True)]
    print(format_table([("step", *HISTORY_MEASURES), *rows]))


if __name__ == "__main__":
    main()
