"""Edge attribution with grouped queries: one backward pass, carried on to the input of every reader.

EAP: Syed, Rager and Conmy 2023 (arXiv 2310.10348); with integrated gradients: Hanna, Pezzelle and Belinkov 2024 (arXiv
2403.17806), section 3. The model is not split for it: the gradient at a reader's own product (a query, key, value or
norm) is backpropagated through its weight and the norm to what that reader alone reads of the residual stream.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from glmlens.circuits.graph import Edge, Graph
from glmlens.hook_points import Point
from glmlens.hooks import Hooks
from glmlens.integers import Integer, read_integer
from glmlens.lens import Lens
from glmlens.model import RMSNorm
from glmlens.patch.gradients import RecordedGradients, record_gradients
from glmlens.patch.pairs import PromptPairs, TokenPairs
from glmlens.patch.sites import PatchError
from glmlens.tasks.task import Examples
from glmlens.text.prompts import Prompt

READER_GRADIENT_POINTS = ("attn.q", "attn.k", "attn.v", "ln2.normalized")
READER_INPUT_POINTS = ("resid_pre", "resid_mid")
WRITER_POINTS = ("attn.z", "mlp_out")


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """A score for every edge: an estimate of the change of the metric when the edge carries the corrupt run's value.

    `scores` [reader, writer] are means over pairs, 0 where there is no edge; an edge that the task needs is negative.
    `completeness` is |Σ scores of the embedding's edges - (corrupt - clean)| / |corrupt - clean|: how far they are
    from accounting for the whole difference.
    """

    graph: Graph
    scores: Float[Tensor, "reader writer"] = field(repr=False)
    completeness: float
    about: dict[str, str]

    def __getitem__(self, edge: Edge) -> float:
        """Return the score of (writer, reader), as in ("3.head1", "5.k0"); raise KeyError where there is no edge."""
        writer, reader = edge
        w, r = self.graph.writers.index(writer), self.graph.readers.index(reader)
        if not bool(self.graph.mask[r, w]):
            raise KeyError(f"no edge from {writer} to {reader}: it writes later than that reads")
        return float(self.scores[r, w])

    def top(self, n: Integer = 10) -> list[tuple[Edge, float]]:
        """Return the n edges whose scores are largest in magnitude."""
        n = min(read_integer(n, "n", least=1, error=PatchError), self.scores.numel())
        best = self.scores.abs().flatten().topk(n).indices.tolist()
        width, names = len(self.graph.writers), self.graph
        return [((names.writers[i % width], names.readers[i // width]), float(self.scores.flatten()[i])) for i in best]


def attribute_edges(
    lens: Lens,
    clean: Prompt | Examples,
    corrupt: Prompt | str | None,
    *,
    metric: Any = None,
    method: str = "eap",
    steps: Integer = 5,
) -> EdgeScores:
    """Estimate scores of all edges from pairs of prompts of one length, changed from clean to corrupt.

    "eap" takes the gradient at the clean run; "eap-ig" its mean over `steps` runs at the midpoints of a straight line
    between the two embeddings. The other arguments are those of `sweep`. Raise PatchError for pairs of several lengths.
    """
    if method not in ("eap", "eap-ig"):
        raise PatchError(f"method is {method!r}; choose 'eap' or 'eap-ig'")
    steps = read_integer(steps, "steps", least=1, error=PatchError)
    pairs = PromptPairs.build(lens, clean, corrupt, metric).require_one_length()
    graph = Graph.from_config(lens.cfg)
    names = [
        f"blocks.{i}.{local}" for i in range(lens.cfg.n_layers) for local in (*READER_INPUT_POINTS, *WRITER_POINTS)
    ]
    names += [f"blocks.{lens.cfg.n_layers - 1}.resid_post"]
    clean_run, corrupt_run = (
        record_gradients(lens, tokens, pairs.metric, ["embed"], record_names=names)
        for tokens in (pairs.clean, pairs.corrupt)
    )
    clean_outputs, corrupt_outputs = (compute_writer_outputs(lens, run) for run in (clean_run, corrupt_run))
    difference = [b - a for a, b in zip(clean_outputs, corrupt_outputs, strict=True)]

    path = [None] if method == "eap" else [(k + 0.5) / steps for k in range(steps)]
    scores = torch.zeros(len(graph.readers), len(graph.writers), dtype=score_dtype(lens), device=lens.device)
    for alpha in path:
        hooks = None
        if alpha is not None:
            hooks = interpolate_embeddings(clean_run.values["embed"], corrupt_run.values["embed"], alpha)
        scores += compute_edge_scores(lens, graph, pairs, difference, hooks) / len(path)
    scores /= len(pairs)
    change = float((corrupt_run.metric - clean_run.metric).mean())
    missing = abs(float(scores[:, 0].sum()) - change) / max(abs(change), 1e-12)
    about = {
        "metric": pairs.metric.name,
        "method": method if method == "eap" else f"{method}, {steps} midpoints",
        "sign": "corrupt - clean: an edge that the task needs is negative",
        "heads": "queries by query head, keys and values by group",
        "pairs": str(len(pairs)),
        "baselines": f"clean {float(clean_run.metric.mean()):.4g}, corrupt {float(corrupt_run.metric.mean()):.4g}",
        "completeness": f"{missing:.3g} of the difference is not accounted for by the embedding's edges",
        "model": lens.model_hash,
    }
    return EdgeScores(graph, scores, missing, about)


def score_dtype(lens: Lens) -> torch.dtype:
    """Return the dtype in which scores are summed: at least float32."""
    return torch.promote_types(lens.dtype, torch.float32)


def interpolate_embeddings(clean: Tensor, corrupt: Tensor, alpha: float) -> Hooks:
    """Return a hook that replaces the embedding by corrupt + alpha (clean - corrupt)."""

    def replace_embedding(x: Tensor, point: Point) -> Tensor:
        return corrupt + alpha * (clean - corrupt)

    return [("embed", replace_embedding)]


def compute_writer_outputs(lens: Lens, run: RecordedGradients) -> list[Float[Tensor, "example pos writer model"]]:
    """Return what is added to the residual stream: by the embedding, and by each layer's heads and its MLP."""
    out = [run.values["embed"].unsqueeze(2)]
    for i, block in enumerate(lens.model.blocks):
        heads = einsum(run.values[f"blocks.{i}.attn.z"], lens.W_O[i],
                       "batch pos head d, head d model -> batch pos head model")  # fmt: skip
        out.append(apply_post_norm_by_head(block.ln1_post, heads))
        out.append(run.values[f"blocks.{i}.mlp_out"].unsqueeze(2))
    return out


def apply_post_norm_by_head(
    norm: Any, parts: Float[Tensor, "batch pos head model"]
) -> Float[Tensor, "batch pos head model"]:
    """Return each head's share of attention's output.

    glm4 has a norm after attention. It divides by the root mean square of the heads' sum, so every head's part is
    divided by that number, and the parts still sum to the output.
    """
    if not isinstance(norm, RMSNorm):
        return parts
    total = parts.sum(2, keepdim=True)
    exact = total.to(torch.promote_types(total.dtype, torch.float32))
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.weight * (parts.to(exact.dtype) * scale).to(parts.dtype)


def backpropagate_norm(norm: Any, x: Float[Tensor, "batch pos model"], gradient: Tensor) -> Tensor:
    """Return the gradient [batch pos reader model] at x from those at norm(x): [γ⊙g - x̂ mean(x̂⊙γ⊙g)] / rms."""
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps).unsqueeze(2)
    unit, g = x.unsqueeze(2) * scale, norm.weight * gradient
    return scale * (g - unit * (unit * g).mean(-1, keepdim=True))


def compute_edge_scores(
    lens: Lens,
    graph: Graph,
    pairs: TokenPairs,
    difference: list[Tensor],
    hooks: Hooks | None,
) -> Float[Tensor, "reader writer"]:
    """Return Δ written · gradient at what is read, for every edge, summed over examples and positions."""
    n = lens.cfg.n_layers
    names = [f"blocks.{i}.{local}" for i in range(n) for local in READER_GRADIENT_POINTS] + ["ln_final.normalized"]
    recorded = [f"blocks.{i}.{local}" for i in range(n) for local in READER_INPUT_POINTS] + [
        f"blocks.{n - 1}.resid_post"
    ]
    run = record_gradients(lens, pairs.clean, pairs.metric, names, hooks, recorded)
    scores = torch.zeros(len(graph.readers), len(graph.writers), dtype=score_dtype(lens), device=lens.device)
    for i in range(n):
        # `difference` holds the embedding, then heads and MLP of every layer: attention of layer i reads 1 + 2i parts.
        norm, resid = lens.model.blocks[i].ln1, run.values[f"blocks.{i}.resid_pre"]
        slope = backpropagate_norm(norm, resid, attention_input_gradients(lens, run, i))
        fill_reader_scores(scores, graph.attention_reader_slice(i), slope, difference[: 1 + 2 * i])
        # The MLP reads this layer's heads too.
        norm, resid = lens.model.blocks[i].ln2, run.values[f"blocks.{i}.resid_mid"]
        slope = backpropagate_norm(norm, resid, run.gradients[f"blocks.{i}.ln2.normalized"].unsqueeze(2))
        mlp_row = graph.attention_reader_slice(i).stop
        fill_reader_scores(scores, slice(mlp_row, mlp_row + 1), slope, difference[: 2 + 2 * i])
    resid = run.values[f"blocks.{n - 1}.resid_post"]
    slope = run.gradients["ln_final.normalized"]
    # The metric may read the last position alone: the gradient at the others is 0.
    slope = torch.nn.functional.pad(slope, (0, 0, resid.shape[1] - slope.shape[1], 0)).unsqueeze(2)
    fill_reader_scores(scores, slice(-1, None), backpropagate_norm(lens.model.ln_final, resid, slope), difference)
    return scores


def attention_input_gradients(
    lens: Lens, run: RecordedGradients, layer: int
) -> Float[Tensor, "batch pos reader model"]:
    """Return the gradients at attention's input by reader: queries by head, keys and values by group."""
    parts = []
    for point, W in (("q", lens.W_Q[layer]), ("k", lens.W_K[layer]), ("v", lens.W_V[layer])):
        slope = run.gradients[f"blocks.{layer}.attn.{point}"]
        parts.append(einsum(slope, W, "batch pos head d, head model d -> batch pos head model"))
    return torch.cat(parts, 2)


def fill_reader_scores(
    scores: Tensor, rows: slice, gradient: Float[Tensor, "batch pos reader model"], difference: list[Tensor]
) -> None:
    """Fill in the scores of some readers with the writers before them, a layer of writers at a time."""
    start, dtype = 0, scores.dtype
    reader = rearrange(gradient.to(dtype), "batch pos reader model -> reader (batch pos model)")
    for part in difference:
        writer = rearrange(part.to(dtype), "batch pos writer model -> writer (batch pos model)")
        scores[rows, start : start + len(writer)] = reader @ writer.T
        start += len(writer)
