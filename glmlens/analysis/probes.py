"""Linear probes: what can be read off a recording by a line, and how much of that the line learnt by heart."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from glmlens.integers import Integer, read_integer
from glmlens.results import Labelled

PROBE_MEASURES = ("train", "held out", "control", "selectivity", "chance")


@dataclass(frozen=True, eq=False, repr=False)
class Probe(Labelled):
    """Accuracies of linear probes [layer, part]: on the examples fitted, on those held out, of a control task.

    "selectivity" is held-out accuracy less the control's: a probe that scores as well on labels drawn at random for
    every type of example reads nothing off the model. "chance" is the share of the most frequent label.
    `directions` [layer, label, model] are the probes' weights on the numbers as they were recorded, of the labels
    `classes` in this order.
    """

    directions: np.ndarray = field(kw_only=True)
    classes: tuple[Hashable, ...] = field(kw_only=True)

    def direction(self, layer: Integer | str, label: Hashable) -> Tensor:
        """The unit vector along which this label grows most against the mean of the others, [model].

        `layer` is the number that a label along that axis says, as in `at`. Raises KeyError for a label that the probe
        was not fitted to tell.
        """
        known = [i for i, name in enumerate(self.classes) if name == label]
        known = known or [i for i, name in enumerate(self.classes) if str(name) == label]
        if len(known) != 1:
            raise KeyError(f"{label!r} is no label of this probe: it tells {', '.join(map(repr, self.classes))}")
        rows = torch.from_numpy(self.directions[self.place("layer", layer)])
        found = rows[known[0]] - rows.mean(0)
        return found / found.norm()

    def keep(self, axis: str, places: Sequence[int]) -> "Probe":
        """Some places along an axis with their labels and, of layers, with their directions."""
        kept = super().keep(axis, places)
        return replace(kept, directions=self.directions[list(places)]) if axis == "layer" else kept


def probe(
    recorded: Float[Tensor, "layer example model"] | Float[Tensor, "example model"],
    labels: Sequence[Hashable],
    *,
    types: Sequence[Hashable] | None = None,
    held_out: float = 0.3,
    l2: float = 1.0,
    seed: Integer = 0,
    layers: Sequence[Integer] | Sequence[str] | None = None,
) -> Probe:
    """Fit a logistic probe at every layer, on some examples, and measure it on the others.

    `layers` says which layers were recorded, by number or name: by default 0, 1, 2 and so on.

    `types` says which examples are of one kind (the same word): the control task gives each type a label of its own,
    drawn at random (Hewitt & Liang 2019, arXiv 1909.03368, section 2). By default every example is its own type.
    `l2` is the weight of the squared weights, on recorded numbers that are standardised. Raises ValueError when a label
    is missing among the examples that are fitted, or lengths differ.
    """
    seed = read_integer(seed, "seed", least=0)
    x = recorded if recorded.ndim == 3 else recorded[None]
    named = [str(i) for i in (range(len(x)) if layers is None else layers)]
    if len(named) != len(x):
        raise ValueError(f"{len(named)} layers named, and {len(x)} recorded")
    classes = sorted(set(labels), key=str)
    if len(labels) != x.shape[1] or len(types or labels) != x.shape[1]:
        raise ValueError(f"{len(labels)} labels and {len(types or labels)} types for {x.shape[1]} recorded examples")
    if len(classes) < 2:
        raise ValueError(f"every example is labelled {classes[0]!r}: nothing to tell apart")
    draw = np.random.default_rng(seed)
    order = draw.permutation(x.shape[1])
    n = round(held_out * len(order))
    test, train = torch.from_numpy(order[:n]), torch.from_numpy(order[n:])
    y = torch.tensor([classes.index(label) for label in labels])
    missing = [classes[i] for i in range(len(classes)) if i not in set(y[train].tolist())]
    if missing or not n:
        raise ValueError(f"no examples of {missing} to fit" if missing else f"held_out={held_out} holds out none")
    kinds = {kind: i for i, kind in enumerate(dict.fromkeys(types or range(len(y))))}
    drawn = draw.choice(y.numpy(), len(kinds))
    control = torch.tensor([int(drawn[kinds[kind]]) for kind in (types or range(len(y)))])
    rows, directions = [], []
    for layer in x.detach().to("cpu", torch.float64):
        found, weights = fit_probe(layer, y, train, test, len(classes), l2)
        chance = float(y[test].bincount().max()) / n
        by_heart = fit_probe(layer, control, train, test, len(classes), l2)[0][1]
        rows.append([*found, by_heart, found[1] - by_heart, chance])
        directions.append(weights.float().numpy())
    about = {
        "metric": f"accuracy of a linear probe, {n} of {len(y)} examples held out, l2 {l2:g}",
        "classes": " | ".join(map(str, classes)),
        "control": f"labels drawn at random for each of {len(kinds)} types",
    }
    return Probe(
        np.array(rows), ("layer", "part"), {"layer": named, "part": list(PROBE_MEASURES)}, about,
        directions=np.stack(directions), classes=tuple(classes),
    )  # fmt: skip


def fit_probe(
    x: Float[Tensor, "example model"],
    y: Int[Tensor, "example"],
    train: Int[Tensor, "some"],
    test: Int[Tensor, "others"],
    classes: int,
    l2: float,
) -> tuple[tuple[float, float], Float[Tensor, "label model"]]:
    """Accuracy on the examples fitted and on the others, and the weights on the numbers as they are."""
    mean, scale = x[train].mean(0), x[train].std(0).clamp(min=1e-8)
    z = (x - mean) / scale
    with torch.enable_grad():
        weights = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
        bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
        stepper = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            stepper.zero_grad()
            data = torch.nn.functional.cross_entropy(z[train] @ weights.T + bias, y[train], reduction="sum")
            total = data + l2 / 2 * weights.pow(2).sum()
            total.backward()
            return total

        stepper.step(loss)
    right = ((z @ weights.T + bias).argmax(-1) == y).double().detach()
    return (float(right[train].mean()), float(right[test].mean())), (weights / scale).detach()
