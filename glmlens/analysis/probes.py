"""Linear probes on recorded activations, with a control task that measures how much a probe memorises."""

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
    """Accuracies of linear probes [layer, part]: on training examples, on held-out ones, and on a control task.

    "selectivity" is held-out accuracy minus the control's: a probe that is as accurate on labels drawn at random for
    every type of example shows nothing about the model. "chance" is the share of the most frequent label.
    `directions` [layer, label, model] are the probes' weights on the recorded activations, of the labels `classes` in
    this order.
    """

    directions: np.ndarray = field(kw_only=True)
    classes: tuple[Hashable, ...] = field(kw_only=True)

    def direction(self, layer: Integer | str, label: Hashable) -> Tensor:
        """Return the unit vector that raises this label's logit most against the mean of all labels, [model].

        `layer` is the number in a label along that axis, as in `at`. Raises KeyError for a label or layer that the
        probe was not fitted to.
        """
        matches = [i for i, name in enumerate(self.classes) if name == label]
        if not matches:  # also by its text: "3" for 3
            matches = [i for i, name in enumerate(self.classes) if str(name) == label]
        if len(matches) != 1:
            raise KeyError(f"{label!r} is no label of this probe; it has {', '.join(map(repr, self.classes))}")
        weights = torch.from_numpy(self.directions[self.place("layer", layer)])
        difference = weights[matches[0]] - weights.mean(0)
        return difference / difference.norm()

    def keep(self, axis: str, places: Sequence[int]) -> "Probe":
        """Return some places along an axis with their labels and, of layers, with their directions."""
        kept = super().keep(axis, places)
        if axis != "layer":
            return kept
        return replace(kept, directions=self.directions[list(places)])


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
    """Fit a logistic probe at every layer on part of the examples, and measure its accuracy on the others.

    `layers` are the numbers or names of the recorded layers: by default 0, 1, 2 and so on. `types` gives the type of
    every example (such as its word): the control task draws one label at random for each type (Hewitt & Liang 2019,
    arXiv 1909.03368, section 2). By default every example is its own type. `held_out` is the share of held-out
    examples, `l2` the factor of the squared weights, on standardised activations. Raises ValueError when a label is
    missing among the training examples, or lengths differ.
    """
    seed = read_integer(seed, "seed", least=0)
    x = recorded if recorded.ndim == 3 else recorded[None]
    layer_names = [str(i) for i in (range(len(x)) if layers is None else layers)]
    if len(layer_names) != len(x):
        raise ValueError(f"{len(layer_names)} layers named, and {len(x)} recorded")
    classes = sorted(set(labels), key=str)
    if len(labels) != x.shape[1] or len(types or labels) != x.shape[1]:
        raise ValueError(f"{len(labels)} labels and {len(types or labels)} types for {x.shape[1]} recorded examples")
    if len(classes) < 2:
        raise ValueError(f"every example is labelled {classes[0]!r}: a probe needs at least two labels")
    draw = np.random.default_rng(seed)
    order = draw.permutation(x.shape[1])
    n = round(held_out * len(order))
    test, train = torch.from_numpy(order[:n]), torch.from_numpy(order[n:])
    y = torch.tensor([classes.index(label) for label in labels])
    missing = [classes[i] for i in range(len(classes)) if i not in set(y[train].tolist())]
    if missing or not n:
        raise ValueError(f"no examples of {missing} to fit" if missing else f"held_out={held_out} holds out none")
    # One random label per type, drawn with the frequencies of the real labels.
    type_numbers = {kind: i for i, kind in enumerate(dict.fromkeys(types or range(len(y))))}
    control_labels = draw.choice(y.numpy(), len(type_numbers))
    control = torch.tensor([int(control_labels[type_numbers[kind]]) for kind in (types or range(len(y)))])
    chance = float(y[test].bincount().max()) / n
    accuracies, directions = [], []
    for layer in x.detach().to("cpu", torch.float64):
        (on_train, on_test), weights = fit_probe(layer, y, train, test, len(classes), l2)
        (_, on_control), _ = fit_probe(layer, control, train, test, len(classes), l2)
        accuracies.append([on_train, on_test, on_control, on_test - on_control, chance])  # as PROBE_MEASURES
        directions.append(weights.float().numpy())
    about = {
        "metric": f"accuracy of a linear probe, {n} of {len(y)} examples held out, l2 {l2:g}",
        "classes": " | ".join(map(str, classes)),
        "control": f"labels drawn at random for each of {len(type_numbers)} types",
    }
    return Probe(
        np.array(accuracies), ("layer", "part"), {"layer": layer_names, "part": list(PROBE_MEASURES)}, about,
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
    """Fit one probe. Return its accuracies on train and test examples, and its weights on x as it is."""
    mean, scale = x[train].mean(0), x[train].std(0).clamp(min=1e-8)
    z = (x - mean) / scale
    with torch.enable_grad():
        weights = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
        bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            data = torch.nn.functional.cross_entropy(z[train] @ weights.T + bias, y[train], reduction="sum")
            total = data + l2 / 2 * weights.pow(2).sum()
            total.backward()
            return total

        optimizer.step(loss)
    correct = ((z @ weights.T + bias).argmax(-1) == y).double().detach()
    # Divided by the scale, the weights act on activations that are not standardised.
    return (float(correct[train].mean()), float(correct[test].mean())), (weights / scale).detach()
