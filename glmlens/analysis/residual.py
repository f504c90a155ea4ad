"""The residual stream: its state after every layer, and the contributions whose sum it is."""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from glmlens.analysis.layer_norms import norm_weight
from glmlens.analysis.logit_lens import residual_streams
from glmlens.analysis.prompt_batch import Position, PromptBatch, layer_labels
from glmlens.dtypes import upcast
from glmlens.hooks import Hooks
from glmlens.lens import Lens
from glmlens.recording.activations import Activations
from glmlens.results import Labelled
from glmlens.text.prompts import Prompt


def accumulated_residual(
    lens: Lens, prompt: Prompt, *, mid: bool = False, position: Position | None = None, hooks: Hooks | None = None
) -> Labelled:
    """Return the residual stream after the embedding and after every layer: [layer, pos, model].

    With `mid` also before every MLP. With `position`, an absolute position, there is no axis pos. Several prompts have
    an axis `prompt` in front.
    """
    rows = PromptBatch.from_prompt(lens, prompt)
    acts = rows.record(["embed", "resid_post", *(["resid_mid"] if mid else [])], hooks)
    streams = residual_streams(lens, acts, mid)
    return stack_streams(rows, "layer", streams, position, "the residual stream")


def decompose_residual(
    lens: Lens,
    prompt: Prompt,
    *,
    by: str = "component",
    position: Position | None = None,
    hooks: Hooks | None = None,
) -> Labelled:
    """Return the contributions to the residual stream: [part, pos, model]. Their sum is the last residual stream.

    `by` is "layer", "component" (attention and MLP of every layer) or "head" (every head, and the MLPs). In a `glm4`,
    contributions are after the norm on the sublayer's output. Raises ValueError for another `by`; there are too many
    neurons for this: see `logit_attribution`.
    """
    if by not in ("layer", "component", "head"):
        raise ValueError(f"by is {by!r}; choose from 'layer', 'component', 'head'")
    rows = PromptBatch.from_prompt(lens, prompt)
    names = ["embed", "mlp_out", *(["attn.z"] if by == "head" else ["attn_out"])]
    post = ["ln1_post.scale"] if by == "head" and lens.cfg.sandwich else []
    acts = rows.record([*names, *post], hooks)
    parts = {"embed": acts["embed"]}
    for i, layer in enumerate(layer_labels(lens)):
        parts |= layer_contributions(lens, acts, i, layer, by)
    return stack_streams(rows, "part", parts, position, "what is added to the residual stream")


def layer_contributions(lens: Lens, acts: Activations, layer: int, name: str, by: str) -> dict[str, Tensor]:
    """Return the contributions of a layer by label."""
    mlp = upcast(acts["mlp_out", layer])
    if by == "layer":
        return {name: upcast(acts["attn_out", layer]) + mlp}
    if by == "component":
        return {f"{name} attn": acts["attn_out", layer], f"{name} mlp": mlp}
    heads = head_outputs(lens, acts, layer).unbind(2)
    return {f"{name}.{head}": x for head, x in enumerate(heads)} | {f"{name} mlp": mlp}


def head_outputs(lens: Lens, acts: Activations, layer: int) -> Float[Tensor, "batch pos head model"]:
    """Return the contribution of each head: W_O z, scaled by the norm on attention's output if there is one (glm4)."""
    z, W_O = upcast(acts["attn.z", layer]), upcast(lens.W_O[layer])
    out = einsum(z, W_O, "batch pos head d, head d model -> batch pos head model")
    weight = norm_weight(lens.model, layer, "ln1_post")
    if weight is None:
        return out
    # The norm is linear given the scale of the sum over heads, so each head is scaled by it.
    return out * upcast(acts["ln1_post.scale", layer]).unsqueeze(2) * upcast(weight)


def stack_streams(
    rows: PromptBatch, axis: str, parts: dict[str, Tensor], position: Position | None, metric: str
) -> Labelled:
    """Return tensors [batch, pos, model] as one labelled result, at all positions or at one."""
    labels = {axis: list(parts)}
    if position is None:
        values = torch.stack([rows.align_to_positions(upcast(x)) for x in parts.values()], 1)
        about = rows.describe(metric=metric, direction="every channel of the model", positions="absolute")
        return rows.to_labelled(values, f"{axis} pos model", {**labels, "pos": rows.position_labels()}, about)
    columns = rows.columns_at(position)
    row_numbers = torch.arange(rows.batch, device=columns.device)
    values = torch.stack([upcast(x[row_numbers, columns]) for x in parts.values()], 1)
    about = rows.describe(
        metric=metric, direction="every channel of the model", positions=rows.describe_columns(columns)
    )
    return rows.to_labelled(values, f"{axis} model", labels, about)
