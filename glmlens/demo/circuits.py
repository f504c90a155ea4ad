"""How the small GLM does it: three circuits of the model inside, each proven by taking its parts away."""

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
    return f"{head[0]}.{head[1]}"


def list_heads(lens: Lens) -> list[HeadIndex]:
    return [(layer, head) for layer in range(lens.cfg.n_layers) for head in range(lens.cfg.n_heads)]


def swap_head_outputs(heads: Iterable[HeadIndex], other: Activations) -> dict[str, Edit]:
    """Hooks that put another run's values where these heads write: an array of the same shape, or one that fits it."""
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
    """The same activations, each the mean over all prompts and all positions from `first` on."""
    return Activations({name: x[:, first:].mean((0, 1), keepdim=True).expand_as(x) for name, x in acts.items()})


# ---- induction ----


@dataclass(frozen=True)
class RepeatedPrompts:
    """Random words said twice: the prompt, and how well what was said before is said again."""

    tokens: Int[Tensor, "batch pos"]
    length: int

    @staticmethod
    def draw(lens: Lens, rows: int = 40, length: int = 20, seed: int = 0) -> "RepeatedPrompts":
        said = draw_words(lens, rows, length, seed, None)
        prefix = torch.tensor(lens.tokenizer.prefix if lens.tokenizer else (), dtype=torch.long).expand(rows, -1)
        return RepeatedPrompts(torch.cat([prefix, said, said], 1).to(lens.device), length)

    def measure_loss(self, logits: Float[Tensor, "batch pos vocab"]) -> float:
        """Nats per token of what is said for the second time."""
        return -float(token_log_probs(logits, self.tokens)[:, -self.length :].mean())

    def measure_accuracy(self, logits: Float[Tensor, "batch pos vocab"]) -> float:
        """How often the word that followed last time is the most probable, at the second time of all but the first."""
        again = self.tokens[:, 1 - self.length :]
        return float((logits[:, -self.length : -1].argmax(-1) == again).float().mean())

    def measure_attention(self, lens: Lens) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
        """How much each head attends to the previous token, and to what followed the same word before."""
        _, acts = lens.run_with_cache(self.tokens, "attn.pattern", logits=False)
        pattern = acts["attn.pattern"].float().mean(1)
        prefix = self.tokens.shape[1] - 2 * self.length
        previous = pattern.diagonal(-1, -2, -1)[..., prefix:].mean(-1)
        return previous, pattern.diagonal(1 - self.length, -2, -1)[..., prefix + 1 :].mean(-1)


def measure_induction_circuit(lens: Lens) -> dict[str, Any]:
    """The heads that copy what followed before, the heads that feed them, and what is left without either."""
    repeats = RepeatedPrompts.draw(lens)
    logits, acts = lens.run_with_cache(repeats.tokens, "attn.z")
    assert logits is not None
    previous, copying = repeats.measure_attention(lens)
    means = average_activations(acts, repeats.tokens.shape[1] - 2 * repeats.length)

    def measure_without(heads: list[HeadIndex]) -> float:
        return repeats.measure_accuracy(lens.run_with_hooks(repeats.tokens, swap_head_outputs(heads, means)))

    feeding = [head for head in list_heads(lens) if previous[head] > 0.5]
    copiers = [head for head in list_heads(lens) if copying[head] > 0.3]
    rest = [head for head in list_heads(lens) if head[0] in {layer for layer, _ in copiers} and head not in copiers]
    least = sorted(rest, key=lambda head: float(copying[head]))[: len(copiers)]
    return {
        "previous-token heads": {format_head(head): float(previous[head]) for head in feeding},
        "induction heads": {format_head(head): float(copying[head]) for head in copiers},
        "chance": 1 / len(lens.tokenizer.list_word_ids()) if lens.tokenizer else 0.0,
        "accuracy": repeats.measure_accuracy(logits),
        "without the induction heads": measure_without(copiers),
        "without as many others of their layers": measure_without(least),
        "without the previous-token heads": measure_without(feeding),
        "others": [format_head(head) for head in least],
    }


# ---- facts ----


def find_part_columns(examples: Examples, name: str) -> Int[Tensor, "example"]:
    """The column of a named part in the left-padded batch of these examples."""
    lengths = torch.tensor([len(row) for row in examples.tokens])
    return examples.at(name) + lengths.max() - lengths


def measure_fact_circuit(lens: Lens, n: int = 150) -> dict[str, Any]:
    """The share of the logit difference that comes back when the residual stream of one place is the clean one's.

    Causal tracing between two subjects: Meng et al. 2022, arXiv 2202.05262, section 2.
    """
    examples = TASKS["facts"].examples(lens, n, "circuit")
    corrupt = examples.counterfactual("subject")
    clean_logits, acts = lens.run_with_cache(examples.tokens, "resid_post")
    assert clean_logits is not None
    clean, broken = examples.measure(clean_logits).mean(), examples.measure(lens(corrupt)).mean()
    found: dict[str, Any] = {"clean": float(clean), "other subject": float(broken)}
    for part in ("subject", "end"):
        at = find_part_columns(examples, part)

        def restore(x: Tensor, point: Point, at: Tensor = at) -> Tensor:
            assert point.layer is not None
            x[torch.arange(n), at] = acts["resid_post", point.layer][torch.arange(n), at]
            return x

        runs = [lens.run_with_hooks(corrupt, {f"blocks.{i}.resid_post": restore}) for i in range(lens.cfg.n_layers)]
        found[f"restored at the {part}"] = [
            float((examples.measure(x).mean() - broken) / (clean - broken)) for x in runs
        ]
    return found


# ---- indirect object identification ----


def measure_ioi_circuit(lens: Lens, n: int = 150) -> dict[str, Any]:
    """What each part is worth when another sentence's values stand in its place, and what the heads look at.

    The other sentence names three people once each (the p_ABC of Wang et al. 2022, arXiv 2211.00593, section 2.1).
    What is lost is said over all sentences and by which name comes first: a head that says who is named where may help
    in the one order as much as it hinders in the other. "direct" is what a part adds to the logit difference itself,
    and what a later part makes of it is that part's.
    """
    examples = TASKS["ioi"].examples(lens, n, "circuit")
    logits, acts = lens.run_with_cache(examples, ["attn.z", "attn.pattern", "mlp_out"])
    _, other = lens.run_with_cache(examples.counterfactual("abc"), ["attn.z", "mlp_out"], logits=False)
    assert logits is not None
    each = examples.measure(logits)
    clean, orders = float(each.mean()), split_by_order(examples)

    def measure_lost(hooks: dict[str, Edit]) -> Float[Tensor, "example"]:
        return each - examples.measure(lens.run_with_hooks(examples, hooks))

    def average_by_order(lost: Float[Tensor, "example"]) -> dict[str, float]:
        """The mean over all, and over the sentences of each order."""
        return {"lost without": float(lost.mean()), **{name: float(lost[rows].mean()) for name, rows in orders.items()}}

    heads = {head: average_by_order(measure_lost(swap_head_outputs([head], other))) for head in list_heads(lens)}
    mlps = {
        i: average_by_order(measure_lost({f"blocks.{i}.mlp_out": make_replacement(other["mlp_out", i])}))
        for i in range(lens.cfg.n_layers)
    }
    most = {head: max(map(abs, part.values())) for head, part in heads.items()}
    chosen = [head for head in sorted(most, key=lambda head: -most[head]) if most[head] > 0.05 * clean]
    direct = {by: analysis.logit_attribution(lens, examples, by=by) for by in ("head", "mlp")}
    looks = measure_head_attention(examples, acts)
    return {
        "clean": clean,
        "accuracy": examples.accuracy(logits),
        "heads": {
            format_head(head): {
                **heads[head],
                "direct": direct["head"].at(layer=head[0], head=head[1]),
                **{name: float(look[head]) for name, look in looks.items()},
            }
            for head in chosen
        },
        "mlps": {str(i): {**part, "direct": direct["mlp"].at(layer=i)} for i, part in mlps.items()},
        "direct of all heads": float(direct["head"].values.sum()),
        "left without these heads": float((each - measure_lost(swap_head_outputs(chosen, other))).mean()),
        "left with only these heads": float(
            (each - measure_lost(swap_head_outputs([head for head in heads if head not in chosen], other))).mean()
        ),
    }


def split_by_order(examples: Examples) -> dict[str, Bool[Tensor, "example"]]:
    """Which sentences name the one who receives first ("Mary and John ... John gave"), and which second."""
    first = torch.tensor([example.item.slots["order"] == "ABBA" for example in examples])
    return {"receiver first": first, "receiver second": ~first}


def measure_head_attention(examples: Examples, acts: Activations) -> dict[str, Float[Tensor, "layer head"]]:
    """How much every head attends, in the mean over the examples, from one named place to another."""
    at = {name: find_part_columns(examples, name) for name in ("IO", "S1", "S2", "verb", "end")}
    orders = split_by_order(examples)
    at["first name"], at["second name"] = (torch.where(rows, at["IO"], at["S1"]) for rows in orders.values())
    pattern, rows = acts["attn.pattern"], torch.arange(len(examples))
    ways = [("end", to) for to in ("first name", "second name", "S2", "verb")] + [("verb", "S2")]
    return {f"{a} to {b}": pattern[:, rows, :, at[a], at[b]].mean(0) for a, b in ways}


def make_replacement(value: Tensor) -> Callable[[Tensor, Point], Tensor]:
    """A hook that puts a value, whatever was there."""
    return lambda x, point: value.to(x.dtype)
