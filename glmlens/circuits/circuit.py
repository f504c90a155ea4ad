"""Circuits: sets of edges, run exactly by masks, and how much of a task each carries.

A reader's input is a sum over writers: for a writer with an edge to it the output in this run, for every other the
ablated value. Definitions: Wang et al. 2022 (arXiv 2211.00593), section 4, normalised as in Marks et al. 2024 (arXiv
2403.19647); the curves and their areas are MIB's, Mueller et al. 2025 (arXiv 2504.13151), section 3.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glmlens.circuits.edge_attribution import EdgeScores, apply_post_norm_by_head, compute_writer_outputs
from glmlens.circuits.graph import Edge, Graph
from glmlens.deprecated import rename_method
from glmlens.hooks import off
from glmlens.integers import Integer, read_integer
from glmlens.lens import Lens
from glmlens.model import Angles, Block, absolute_positions, additive_mask, apply_rotary, rotary_angles
from glmlens.patch.gradients import record_gradients
from glmlens.patch.pairs import PromptPairs
from glmlens.patch.sites import PatchError
from glmlens.results import Labelled
from glmlens.tasks.task import Examples
from glmlens.text.prompts import Prompt

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares of edges at which MIB measures."""
ABLATIONS = ("corrupt", "mean", "zero")


@dataclass(frozen=True, eq=False)
class Circuit:
    """Some of the edges of a graph: `mask` [reader, writer]."""

    graph: Graph
    mask: Bool[Tensor, "reader writer"] = field(repr=False)
    about: str = ""

    without = rename_method("without", "remove_edge")

    @property
    def n_edges(self) -> int:
        return int(self.mask.sum())

    def edges(self) -> list[Edge]:
        """Return the edges as (writer, reader)."""
        return [(self.graph.writers[w], self.graph.readers[r]) for r, w in self.mask.nonzero().tolist()]

    def remove_edge(self, edge: Edge | Any) -> "Circuit":
        """Return the same circuit without one edge (writer, reader); raise PatchError for one that is not in it."""
        writer, reader = edge
        known = writer in self.graph.writers and reader in self.graph.readers
        place = (self.graph.readers.index(reader), self.graph.writers.index(writer)) if known else None
        if place is None or not bool(self.mask[place]):
            raise PatchError(f"no edge {edge!r} in this circuit: an edge is (writer, reader), as in edges()")
        mask = self.mask.clone()
        mask[place] = False
        return replace(self, mask=mask)

    def complement(self) -> "Circuit":
        """Return the circuit of all other edges."""
        return replace(self, mask=self.graph.mask.to(self.mask.device) & ~self.mask, about=f"not ({self.about})")

    def prune(self) -> "Circuit":
        """Return the circuit without the edges that are on no path from the embedding to the logits."""
        mask = self.mask.clone()
        feeds = self.graph.writer_input_mask().to(self.mask.device)  # [writer, reader]: what a writer is computed from
        while True:
            # A writer is reached from the embedding if any reader that it is computed from has an edge.
            reached = (feeds.float() @ mask.any(1, keepdim=True).float()).squeeze(1) > 0
            reached[0] = True
            # A reader leads on to the logits if any writer computed from it has an edge.
            leads_on = feeds.float().T @ mask.any(0).float()[:, None] > 0
            leads_on[-1] = True
            kept = mask & reached & leads_on
            if torch.equal(kept, mask):
                return replace(self, mask=mask, about=f"{self.about}, pruned")
            mask = kept

    def __repr__(self) -> str:
        return f"Circuit({self.n_edges:,} of {self.graph.n_edges:,} edges: {self.about})"


def full_circuit(graph: Graph) -> Circuit:
    """Return the circuit of every edge."""
    return Circuit(graph, graph.mask.clone(), "every edge")


def top_edges(scores: EdgeScores, n: Integer, by: str = "abs") -> Circuit:
    """Return the n edges with the largest scores: by "abs", or by "need", the most negative first."""
    order = rank_edges(scores, by)[: read_edge_count(n, scores)]
    mask = torch.zeros_like(scores.scores, dtype=torch.bool)
    mask.view(-1)[order] = True
    return Circuit(scores.graph, mask, f"the {n} edges largest by {by} of {scores.about['method']}")


def read_edge_count(n: Any, scores: EdgeScores) -> int:
    """Return a number of edges as an int; raise PatchError unless it is from 0 to all."""
    return read_integer(n, "n", size=scores.graph.n_edges + 1, error=PatchError)


def rank_edges(scores: EdgeScores, by: str) -> Int[Tensor, "edge"]:
    """Return the edges' indices in the flattened matrix, the most important first."""
    if by not in ("abs", "need"):
        raise PatchError(f"by is {by!r}; choose 'abs' or 'need'")
    key = scores.scores.abs() if by == "abs" else -scores.scores
    edge = scores.graph.mask.to(key.device)
    return key.masked_fill(~edge, -torch.inf).flatten().argsort(descending=True, stable=True)[: scores.graph.n_edges]


def greedy_circuit(scores: EdgeScores, n: Integer) -> Circuit:
    """Return n edges found from the logits backwards: each time the largest in magnitude into the circuit so far.

    Hanna et al. 2024, arXiv 2403.17806, section 3.
    """
    n = read_edge_count(n, scores)
    graph, feeds, size = scores.graph, scores.graph.writer_input_mask(), scores.scores.abs().cpu()
    mask = torch.zeros_like(size, dtype=torch.bool)
    seen = {len(graph.readers) - 1}  # readers whose edges are in the heap: the logits first
    heap: list[tuple[float, int, int]] = []  # (-magnitude, reader, writer), so that the largest is popped first

    def push_writers(reader: int) -> None:
        for writer in graph.mask[reader].nonzero().flatten().tolist():
            heapq.heappush(heap, (-float(size[reader, writer]), reader, writer))

    push_writers(len(graph.readers) - 1)
    while heap and int(mask.sum()) < n:
        _, reader, writer = heapq.heappop(heap)
        mask[reader, writer] = True
        # The writer is part of the circuit now, so the edges into what it is computed from can be added.
        for further in set(feeds[writer].nonzero().flatten().tolist()) - seen:
            seen.add(further)
            push_writers(further)
    return Circuit(graph, mask.to(scores.scores.device), f"{n} edges, greedily by {scores.about['method']}")


class CircuitEvaluator:
    """Run circuits on pairs of prompts of one length: clean in the circuit, ablated outside.

    `ablation` is "corrupt", the corrupt run's value; "mean", that value's mean over pairs, position by position; or
    "zero". The other arguments are those of `sweep`. Raise PatchError for pairs of several lengths, and for a metric
    that ablating every edge hardly changes.
    """

    logits = rename_method("logits", "run_circuit")
    metric_of = rename_method("metric_of", "measure_circuit")
    choices = rename_method("choices", "describe_choices")

    def __init__(
        self, lens: Lens, clean: Prompt | Examples, corrupt: Prompt | str | None, *, metric: Any = None,
        ablation: str = "corrupt",
    ):  # fmt: skip
        if ablation not in ABLATIONS:
            raise PatchError(f"ablation is {ablation!r}; choose from {', '.join(map(repr, ABLATIONS))}")
        pairs = PromptPairs.build(lens, clean, corrupt, metric).require_one_length()
        self.lens = lens
        self.graph = Graph.from_config(lens.cfg)
        self.ablation = ablation
        self.tokens = pairs.clean
        self.metric = pairs.metric
        names = [f"blocks.{i}.{local}" for i in range(lens.cfg.n_layers) for local in ("attn.z", "mlp_out")]
        run = record_gradients(lens, pairs.corrupt, self.metric, ["embed"], record_names=names)
        parts = rearrange(
            torch.cat(compute_writer_outputs(lens, run), 2), "batch pos writer model -> writer batch pos model"
        )
        if ablation == "mean":
            parts = parts.mean(1, keepdim=True).expand_as(parts)
        self.ablated_values = torch.zeros_like(parts) if ablation == "zero" else parts
        self.full_metric = float(self.measure_circuit(full_circuit(self.graph)).mean())
        self.empty_metric = float(self.measure_circuit(self.empty_circuit()).mean())
        scale = max(abs(self.full_metric), abs(self.empty_metric))
        if abs(self.full_metric - self.empty_metric) < max(1e-3 * scale, 1e-6):
            raise PatchError(
                f"{self.metric.name} is {self.full_metric:.4g} whole and {self.empty_metric:.4g} with every edge "
                "ablated: too close to divide by their distance"
            )

    def empty_circuit(self) -> Circuit:
        """Return the circuit without any edge."""
        return Circuit(self.graph, torch.zeros_like(self.graph.mask), "no edge")

    @torch.no_grad()
    def run_circuit(self, circuit: Circuit) -> Float[Tensor, "example pos vocab"]:
        """Run a circuit and return all its logits; raise PatchError for a circuit of another graph."""
        lens, graph = self.lens, self.graph
        if circuit.graph != graph:
            raise PatchError(f"a circuit of {circuit.graph}; this model is {graph}")
        mask = circuit.mask.to(lens.device, self.ablated_values.dtype)
        # What every writer writes in this run [writer, example, pos, model], filled in layer by layer.
        live = torch.zeros_like(self.ablated_values)
        live[0] = lens.model.embed(self.tokens)
        positions = absolute_positions(self.tokens.shape, lens.device)
        angles = rotary_angles(positions, lens.cfg, live.dtype)
        causal = additive_mask(positions, positions, live.dtype)
        for i in range(lens.cfg.n_layers):
            n, rows = graph.n_writers_before(i), graph.attention_reader_slice(i)
            # One input for every query, key and value; then, after the heads have written, one for the MLP.
            x = self.mix_reader_inputs(mask[rows, :n], live)
            live[n : n + graph.n_heads] = self.run_attention(i, x, angles, causal)
            n += graph.n_heads
            live[n] = self.run_mlp(i, self.mix_reader_inputs(mask[rows.stop : rows.stop + 1, :n], live)[0])
        return lens.model.unembed(lens.model.ln_final(self.mix_reader_inputs(mask[-1:], live)[0]))

    def mix_reader_inputs(
        self, mask: Float[Tensor, "reader writer"], live: Tensor
    ) -> Float[Tensor, "reader batch pos model"]:
        """Return readers' inputs: the ablated values, plus this run's difference to them where there is an edge."""
        n = mask.shape[1]
        through = einsum(
            mask, live[:n] - self.ablated_values[:n], "reader writer, writer batch pos model -> reader batch pos model"
        )
        return self.ablated_values[:n].sum(0) + through

    def run_attention(
        self, layer: int, x: Float[Tensor, "reader batch pos model"], angles: Angles, causal: Tensor
    ) -> Float[Tensor, "head batch pos model"]:
        """Return what each head writes when its query, key and value each have an input of their own."""
        lens, cfg, block = self.lens, self.lens.cfg, cast(Block, self.lens.model.blocks[layer])
        x = torch.stack([block.ln1(part) for part in x])  # reader by reader, as the model norms: [batch, pos, model]
        cuts = (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)
        weights = (lens.W_Q[layer], lens.W_K[layer], lens.W_V[layer])
        q, k, v = (
            einsum(part, W, "head batch pos model, head model d -> batch pos head d")
            for part, W in zip(x.split(cuts), weights, strict=True)
        )
        if cfg.qkv_bias:
            q, k, v = q + lens.b_Q[layer], k + lens.b_K[layer], v + lens.b_V[layer]
        q, k = (torch.cat([apply_rotary(t[..., : cfg.d_rotary], *angles), t[..., cfg.d_rotary :]], -1) for t in (q, k))
        z = block.attn.attend(q, k, v, causal, off)
        heads = einsum(z, lens.W_O[layer], "batch pos head d, head d model -> batch pos head model")
        return rearrange(apply_post_norm_by_head(block.ln1_post, heads), "batch pos head model -> head batch pos model")

    def run_mlp(self, layer: int, x: Float[Tensor, "batch pos model"]) -> Float[Tensor, "batch pos model"]:
        """Return what the MLP writes for this input."""
        block = cast(Block, self.lens.model.blocks[layer])
        return block.ln2_post(block.mlp(block.ln2(x), off))

    def measure_circuit(self, circuit: Circuit) -> Float[Tensor, "example"]:
        """Return the metric of a circuit's run, per pair."""
        examples = torch.arange(len(self.tokens), device=self.lens.device)
        return self.metric.measure(self.run_circuit(circuit), examples)

    # ---- how good it is ----

    def faithfulness(self, circuit: Circuit) -> float:
        """Return f(C) = (m(C) - m(∅)) / (m(M) - m(∅)): 1 is the whole model, 0 everything ablated."""
        return (float(self.measure_circuit(circuit).mean()) - self.empty_metric) / (
            self.full_metric - self.empty_metric
        )

    def completeness(self, circuit: Circuit) -> float:
        """Return f of all the other edges: 0 when nothing of the task is left outside the circuit."""
        return self.faithfulness(circuit.complement())

    def minimality(self, circuit: Circuit) -> list[tuple[Edge, float]]:
        """Return |f(C) - f(C without the edge)| of every edge, the least needed first."""
        f = self.faithfulness(circuit)
        changes = [(edge, abs(f - self.faithfulness(circuit.remove_edge(edge)))) for edge in circuit.edges()]
        return sorted(changes, key=lambda entry: entry[1])

    def curve(
        self, scores: EdgeScores, fractions: Sequence[float] | Any = FRACTIONS, by: str = "abs"
    ) -> "FaithfulnessCurve":
        """Return the faithfulness of the top share of edges, pruned, at several shares.

        Raise PatchError for a share that is not from 0 to 1.
        """
        if isinstance(fractions, int | float):
            fractions = (fractions,)
        wrong = [k for k in fractions if isinstance(k, str) or not 0 <= k <= 1]
        if wrong:
            raise PatchError(f"a share of {wrong[0]!r} edges; shares are from 0 to 1")
        circuits = [top_edges(scores, max(1, round(k * self.graph.n_edges)), by).prune() for k in fractions]
        about = self.describe_choices() | {"scores": scores.about["method"], "model": self.lens.model_hash}
        return FaithfulnessCurve(
            np.array([self.faithfulness(circuit) for circuit in circuits]),
            ("share",),
            {"share": [f"{k:g}" for k in fractions]},
            about,
        )

    def describe_choices(self) -> dict[str, str]:
        """Return the six choices that faithfulness depends on (Miller et al. 2024, arXiv 2407.08734, section 3)."""
        return {
            "granularity": "edges; queries by query head, keys and values by group",
            "component": "residual stream read by heads' q, k and v, MLPs and logits",
            "ablation": self.ablation,
            "positions": "all, position by position",
            "direction": "noise: edges outside the circuit are ablated in the clean run",
            "set": f"{len(self.tokens)} pairs of {self.tokens.shape[1]} tokens, {self.metric.name}: "
            f"{self.full_metric:.4g} whole, {self.empty_metric:.4g} ablated",
        }


@dataclass(frozen=True, eq=False, repr=False)
class FaithfulnessCurve(Labelled):
    """Faithfulness at shares of edges."""

    @property
    def cpr(self) -> float:
        """MIB's circuit performance ratio, ∫ f dk by the trapezoid rule over the shares measured: higher is better."""
        return float(np.trapezoid(self.values, self.shares))

    @property
    def cmd(self) -> float:
        """MIB's circuit-model distance, ∫ |1 - f| dk by the same rule: lower is better."""
        return float(np.trapezoid(np.abs(1 - self.values), self.shares))

    @property
    def shares(self) -> list[float]:
        return [float(k) for k in self.labels["share"]]
