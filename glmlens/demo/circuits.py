"""Measure three circuits of the small GLM: induction, facts and indirect object identification.

Each is tested by ablation or patching: the effect of replacing its parts is compared with that of other parts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glmlens import analysis
from glmlens.analysis.heads import draw_words
from glmlens.hook_points import Point
from glmlens.hooks import Edit
from glmlens.lens import Lens
from glmlens.losses import token_log_probs
from glmlens.recording.activations import Activations
from glmlens.tasks import TASKS
from glmlens.tasks.task import Examples

HeadIndex = tuple[int, int]


def format_head(head: HeadIndex) -> str:
    """Return a head as "layer.head"."""
    return f"{head[0]}.{head[1]}"


def list_heads(lens: Lens) -> list[HeadIndex]:
    """Return all heads, layer by layer."""
    return [(layer, head) for layer in range(lens.cfg.n_layers) for head in range(lens.cfg.n_heads)]


def swap_head_outputs(heads: Iterable[HeadIndex], other: Activations) -> dict[str, Edit]:
    """Return hooks that replace the outputs (`attn.z`) of these heads by those of another run of equal shape."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def edit(layer: int, chosen: list[int]) -> Edit:
        def fn(z: Tensor, point: Point) -> Tensor:
            z[:, :, chosen] = other["attn.z", layer][:, :, chosen]
            return z

        return fn

    return {f"blocks.{layer}.attn.z": edit(layer, chosen) for layer, chosen in by_layer.items()}


def average_activations(acts: Activations, first: int) -> Activations:
    """Return activations of the same shapes, filled with the mean over prompts and positions from `first` on."""
    return Activations({name: x[:, first:].mean((0, 1), keepdim=True).expand_as(x) for name, x in acts.items()})


# ---- induction ----


@dataclass(frozen=True)
class RepeatedPrompts:
    """Prompts of random words that are repeated once, and measures of how well a model predicts the repetition.

    `tokens` is the prefix, then a list of `length` words, then the same list.
    """

    tokens: Int[Tensor, "batch pos"]
    length: int

    @staticmethod
    def draw(lens: Lens, rows: int = 40, length: int = 20, seed: int = 0) -> "RepeatedPrompts":
        """Return `rows` prompts of different random words."""
        words = draw_words(lens, rows, length, seed, None)
        prefix = torch.tensor(lens.tokenizer.prefix if lens.tokenizer else (), dtype=torch.long).expand(rows, -1)
        return RepeatedPrompts(torch.cat([prefix, words, words], 1).to(lens.device), length)

    def measure_loss(self, logits: Float[Tensor, "batch pos vocab"]) -> float:
        """Return the mean loss on the repeated words, in nats per token."""
        return -float(token_log_probs(logits, self.tokens)[:, -self.length :].mean())

    def measure_accuracy(self, logits: Float[Tensor, "batch pos vocab"]) -> float:
        """Return the share of repeated words, without the first, that are the most probable token at their position."""
        again = self.tokens[:, 1 - self.length :]
        return float((logits[:, -self.length : -1].argmax(-1) == again).float().mean())

    def measure_attention(self, lens: Lens) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
        """Return the mean attention of every head to the previous token, and its induction score.

        The induction score is the mean attention of the repeated words to the token after their earlier occurrence.
        """
        _, acts = lens.run_with_cache(self.tokens, "attn.pattern", logits=False)
        pattern = acts["attn.pattern"].float().mean(1)  # over prompts: [layer, head, query, key]
        prefix = self.tokens.shape[1] - 2 * self.length
        previous = pattern.diagonal(-1, -2, -1)[..., prefix:].mean(-1)
        # The token after the earlier occurrence is `length - 1` positions back.
        induction = pattern.diagonal(1 - self.length, -2, -1)[..., prefix + 1 :].mean(-1)
        return previous, induction


def measure_induction_circuit(lens: Lens) -> dict[str, Any]:
    """Return the previous-token and induction heads with their scores, and the accuracy without them.

    Ablated heads write their mean over prompts and positions. The control ablates as many other heads of the layers of
    the induction heads: those with the lowest induction scores.
    """
    repeats = RepeatedPrompts.draw(lens)
    logits, acts = lens.run_with_cache(repeats.tokens, "attn.z")
    assert logits is not None
    previous, induction = repeats.measure_attention(lens)
    means = average_activations(acts, repeats.tokens.shape[1] - 2 * repeats.length)

    def measure_without(heads: list[HeadIndex]) -> float:
        """Return the accuracy with these heads ablated."""
        return repeats.measure_accuracy(lens.run_with_hooks(repeats.tokens, swap_head_outputs(heads, means)))

    previous_heads = [head for head in list_heads(lens) if previous[head] > 0.5]
    induction_heads = [head for head in list_heads(lens) if induction[head] > 0.3]
    layers = {layer for layer, _ in induction_heads}
    others = [head for head in list_heads(lens) if head[0] in layers and head not in induction_heads]
    control = sorted(others, key=lambda head: float(induction[head]))[: len(induction_heads)]
    return {
        "previous-token heads": {format_head(head): float(previous[head]) for head in previous_heads},
        "induction heads": {format_head(head): float(induction[head]) for head in induction_heads},
        "chance": 1 / len(lens.tokenizer.list_word_ids()) if lens.tokenizer else 0.0,
        "accuracy": repeats.measure_accuracy(logits),
        "without the induction heads": measure_without(induction_heads),
        "without as many others of their layers": measure_without(control),
        "without the previous-token heads": measure_without(previous_heads),
        "others": [format_head(head) for head in control],
    }


# ---- facts ----


def find_part_columns(examples: Examples, name: str) -> Int[Tensor, "example"]:
    """Return the column of a named part in the left-padded batch of the examples."""
    lengths = torch.tensor([len(row) for row in examples.tokens])
    return examples.at(name) + lengths.max() - lengths


def measure_fact_circuit(lens: Lens, n: int = 150) -> dict[str, Any]:
    """Return the share of the logit difference that is restored by patching the residual stream at one position.

    The clean prompt asks about one country, the corrupt one about another. The residual stream after each layer is
    patched at the subject or at the last position. Causal tracing: Meng et al. 2022, arXiv 2202.05262, section 2.
    """
    examples = TASKS["facts"].examples(lens, n, "circuit")
    corrupt = examples.counterfactual("subject")
    clean_logits, acts = lens.run_with_cache(examples.tokens, "resid_post")
    assert clean_logits is not None
    clean = examples.measure(clean_logits).mean()
    corrupted = examples.measure(lens(corrupt)).mean()
    results: dict[str, Any] = {"clean": float(clean), "other subject": float(corrupted)}
    rows = torch.arange(n)
    for part in ("subject", "end"):
        columns = find_part_columns(examples, part)

        def restore(x: Tensor, point: Point, columns: Tensor = columns) -> Tensor:
            assert point.layer is not None
            x[rows, columns] = acts["resid_post", point.layer][rows, columns]
            return x

        patched = [lens.run_with_hooks(corrupt, {f"blocks.{i}.resid_post": restore}) for i in range(lens.cfg.n_layers)]
        results[f"restored at the {part}"] = [
            float((examples.measure(logits).mean() - corrupted) / (clean - corrupted)) for logits in patched
        ]
    return results


# ---- indirect object identification ----


def measure_ioi_circuit(lens: Lens, n: int = 150) -> dict[str, Any]:
    """Return the effect of every component on the logit difference, and where the important heads attend.

    A component is patched with its output on a sentence that names three different people (p_ABC of Wang et al. 2022,
    arXiv 2211.00593, section 2.1). The drop of the logit difference ("lost without") is averaged over all sentences,
    and over those of each order of the names: a head that copies the name at one position raises the difference in one
    order and lowers it in the other. "direct" is the direct contribution to the logit difference, without effects
    through later components.
    """
    examples = TASKS["ioi"].examples(lens, n, "circuit")
    logits, acts = lens.run_with_cache(examples, ["attn.z", "attn.pattern", "mlp_out"])
    _, other = lens.run_with_cache(examples.counterfactual("abc"), ["attn.z", "mlp_out"], logits=False)
    assert logits is not None
    each = examples.measure(logits)
    clean = float(each.mean())
    orders = split_by_order(examples)

    def measure_lost(hooks: dict[str, Edit]) -> Float[Tensor, "example"]:
        """Return the drop of the logit difference with these hooks."""
        return each - examples.measure(lens.run_with_hooks(examples, hooks))

    def average_by_order(lost: Float[Tensor, "example"]) -> dict[str, float]:
        """Return the mean over all sentences, and over those of each order."""
        return {"lost without": float(lost.mean()), **{name: float(lost[rows].mean()) for name, rows in orders.items()}}

    heads = {head: average_by_order(measure_lost(swap_head_outputs([head], other))) for head in list_heads(lens)}
    mlps = {
        i: average_by_order(measure_lost({f"blocks.{i}.mlp_out": make_replacement(other["mlp_out", i])}))
        for i in range(lens.cfg.n_layers)
    }
    # Heads whose patch changes the difference by 5%, in the mean over all sentences or over those of one order.
    largest = {head: max(map(abs, effects.values())) for head, effects in heads.items()}
    important = [head for head in sorted(largest, key=lambda head: -largest[head]) if largest[head] > 0.05 * clean]
    others = [head for head in heads if head not in important]
    direct = {by: analysis.logit_attribution(lens, examples, by=by) for by in ("head", "mlp")}
    attention = measure_head_attention(examples, acts)
    return {
        "clean": clean,
        "accuracy": examples.accuracy(logits),
        "heads": {
            format_head(head): {
                **heads[head],
                "direct": direct["head"].at(layer=head[0], head=head[1]),
                **{name: float(share[head]) for name, share in attention.items()},
            }
            for head in important
        },
        "mlps": {str(i): {**effects, "direct": direct["mlp"].at(layer=i)} for i, effects in mlps.items()},
        "direct of all heads": float(direct["head"].values.sum()),
        "left without these heads": float((each - measure_lost(swap_head_outputs(important, other))).mean()),
        "left with only these heads": float((each - measure_lost(swap_head_outputs(others, other))).mean()),
    }


def split_by_order(examples: Examples) -> dict[str, Bool[Tensor, "example"]]:
    """Return which sentences name the receiver first ("Mary and John ... John gave"), and which second."""
    first = torch.tensor([example.item.slots["order"] == "ABBA" for example in examples])
    return {"receiver first": first, "receiver second": ~first}


def measure_head_attention(examples: Examples, acts: Activations) -> dict[str, Float[Tensor, "layer head"]]:
    """Return the mean attention of every head from one named position to another, for five pairs of positions."""
    columns = {name: find_part_columns(examples, name) for name in ("IO", "S1", "S2", "verb", "end")}
    orders = split_by_order(examples)
    # By order of mention: the first name is the receiver in one order, the giver in the other.
    columns["first name"] = torch.where(orders["receiver first"], columns["IO"], columns["S1"])
    columns["second name"] = torch.where(orders["receiver second"], columns["IO"], columns["S1"])
    pattern = acts["attn.pattern"]  # [layer, example, head, query, key]
    rows = torch.arange(len(examples))
    pairs = [("end", key) for key in ("first name", "second name", "S2", "verb")] + [("verb", "S2")]
    # Index tensors on both sides of a slice: the example axis comes first in the result, and is averaged.
    return {f"{query} to {key}": pattern[:, rows, :, columns[query], columns[key]].mean(0) for query, key in pairs}


def make_replacement(value: Tensor) -> Callable[[Tensor, Point], Tensor]:
    """Return a hook that replaces an activation by a fixed value."""
    return lambda x, point: value.to(x.dtype)
