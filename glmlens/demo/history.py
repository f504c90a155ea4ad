"""How the circuits of the small GLM formed: `python -m glmlens.demo.history OUT`, of a training kept in OUT.

The trainer keeps the model of every hundredth step as an ordinary checkpoint folder: `glmlens.load("OUT/step-0900")`.
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from glmlens.config import CheckpointError
from glmlens.demo.circuits import RepeatedPrompts
from glmlens.lens import Lens, load
from glmlens.results import Labelled
from glmlens.storage import expand_path
from glmlens.tasks import TASKS
from glmlens.text_tables import format_table

HISTORY_MEASURES = ("words said again", "previous-token head", "induction head", "ioi accuracy", "ioi difference")


def measure_history(out: Path) -> Labelled:
    """What the model of every kept step can do [step, measure], and its best previous-token and induction heads.

    Raises CheckpointError for a folder that holds no training.
    """
    folders = sorted(out.glob("step-*"))
    if not folders:
        raise CheckpointError(f"{out} holds no training: run python -m glmlens.demo.train {out}")
    rows = [measure_checkpoint(load(folder, dtype="float32")) for folder in tqdm(folders, desc="measuring")]
    labels = {"step": [str(int(folder.name.split("-")[1])) for folder in folders], "measure": HISTORY_MEASURES}
    about = {"metric": "shares, attention and logits, as named", "positions": "40 rows of 20 words; 100 sentences"}
    return Labelled(np.array(rows), ("step", "measure"), labels, about)


def measure_checkpoint(lens: Lens) -> tuple[float, ...]:
    repeats, examples = RepeatedPrompts.draw(lens), TASKS["ioi"].examples(lens, 100, "history")
    previous, copying = repeats.measure_attention(lens)
    logits = lens(examples, logits_to_keep=1)
    return (
        repeats.measure_accuracy(lens(repeats.tokens)),
        float(previous.max()),
        float(copying.max()),
        examples.accuracy(logits),
        float(examples.measure(logits).mean()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    found = measure_history(expand_path(parser.parse_args().out))
    rows = [(step, *(f"{x:.2f}" for x in row)) for step, row in zip(found.labels["step"], found.values, strict=True)]
    print(format_table([("step", *HISTORY_MEASURES), *rows]))


if __name__ == "__main__":
    main()
