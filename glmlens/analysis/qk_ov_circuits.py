"""Circuits of heads from the weights alone: OV and QK matrices, copying, and composition between heads.

Vectors are rows, as in `x @ W`. Elhage et al. 2021, A Mathematical Framework for Transformer Circuits. In these models
several query heads share one key-value head, whose number is `head // n_groups`.
"""

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from glmlens.analysis.factored import Factored, eigenvalues
from glmlens.analysis.layer_norms import norm_weight_or_ones
from glmlens.analysis.prompt_batch import describe_kv_groups, read_head, read_layer, to_numpy
from glmlens.dtypes import upcast
from glmlens.integers import Integer, read_integer
from glmlens.lens import Lens
from glmlens.model import apply_rotary, rotary_angles
from glmlens.results import Labelled

VOCAB_CHUNK = 8192  # rows of the embedding multiplied at a time


def OV(lens: Lens, layer: Integer, head: Integer, *, norms: bool = False) -> Factored:
    """Return W_V W_O, the map from a head's input to its output: [model, model] of rank d.

    Its input is ln1.normalized; the head's output also has the constant b_V W_O. With `norms`, the weights of ln1
    before it and of ln1_post (glm4) after it are multiplied in, so that input and output are in the residual stream.
    The norms' scales, a positive number per position, never are. Raises IndexError for a layer or head that is not
    there.
    """
    layer, head = read_layer(lens, layer), read_head(lens, head)
    W_V, W_O = upcast(lens.W_V[layer, kv_head_of(lens, head)]), upcast(lens.W_O[layer, head])
    if not norms:
        return Factored(W_V, W_O)
    before = norm_weight_or_ones(lens.model, layer, "ln1")
    after = norm_weight_or_ones(lens.model, layer, "ln1_post")
    return Factored(before[:, None] * W_V, W_O * after)


def QK(
    lens: Lens, layer: Integer, head: Integer, distance: Integer = 0, *, part: str = "all", norms: bool = False
) -> Factored:
    """Return W_Q R(distance) W_Kᵀ / √d, the bilinear form of scores between a query and a key `distance` before it.

    [model, model] of rank d (Su et al. 2021, arXiv 2104.09864, section 3.2). `part` is "rotary", the rotated channels;
    "pass", the unrotated ones, which do not depend on the distance; or "all", their sum. The score of x at position i
    and y at j is x @ QK(distance=i - j) @ y for normalised x and y, in a model without biases: see `QK_bias`. Raises
    ValueError for a negative distance (attention is causal) and IndexError for a layer or head that is not there.
    """
    layer, head, distance = read_layer(lens, layer), read_head(lens, head), read_integer(distance, "distance")
    if distance < 0:
        raise ValueError(f"distance is {distance}: a query attends to earlier positions, at distance 0 or more")
    W_Q, W_K = upcast(lens.W_Q[layer, head]), upcast(lens.W_K[layer, kv_head_of(lens, head)])
    if norms:
        weight = norm_weight_or_ones(lens.model, layer, "ln1")[:, None]
        W_Q, W_K = weight * W_Q, weight * W_K
    channels = channel_slice(lens, part)
    # Scores depend on the distance only, so the key may be at position 0.
    W_Q, W_K = rotate_rows(lens, W_Q, distance), rotate_rows(lens, W_K, 0)
    return Factored(W_Q[:, channels] * lens.cfg.d_head**-0.5, W_K[:, channels].T)


def QK_bias(
    lens: Lens, layer: Integer, head: Integer, distance: Integer = 0
) -> tuple[Float[Tensor, "model"], Float[Tensor, "model"], float]:
    """Return the terms that biases add to x @ QK @ y: a vector for the query's x, one for the key's y, and a constant.

    The score is x @ QK @ y + x @ on_query + on_key @ y + constant. Zeros in a model without biases.
    """
    layer, head = read_layer(lens, layer), read_head(lens, head)
    distance = read_integer(distance, "distance", least=0)
    W_Q, W_K = upcast(lens.W_Q[layer, head]), upcast(lens.W_K[layer, kv_head_of(lens, head)])
    if not lens.cfg.qkv_bias:
        return W_Q.new_zeros(len(W_Q)), W_Q.new_zeros(len(W_Q)), 0.0
    b_Q, b_K = upcast(lens.b_Q[layer, head]), upcast(lens.b_K[layer, kv_head_of(lens, head)])
    query, b_Q = rotate_rows(lens, W_Q, distance), rotate_rows(lens, b_Q[None], distance)[0]
    key, b_K = rotate_rows(lens, W_K, 0), rotate_rows(lens, b_K[None], 0)[0]
    scale = lens.cfg.d_head**-0.5
    return query @ b_K * scale, key @ b_Q * scale, float(b_Q @ b_K) * scale


def rotate_rows(lens: Lens, rows: Float[Tensor, "row d"], position: int) -> Float[Tensor, "row d"]:
    """Return rows of head channels with the rotary embedding of this position."""
    here = torch.tensor([[position]], device=rows.device)
    cos, sin = rotary_angles(here, lens.cfg, rows.dtype)
    r = lens.cfg.d_rotary
    return torch.cat([apply_rotary(rows[None, None, :, :r], cos, sin)[0, 0], rows[:, r:]], -1)


def channel_slice(lens: Lens, part: str) -> slice:
    """Return the head channels that `part` names. Raise ValueError for one that this model does not have."""
    slices = {"all": slice(None), "rotary": slice(lens.cfg.d_rotary), "pass": slice(lens.cfg.d_rotary, None)}
    if part not in slices:
        raise ValueError(f"part is {part!r}; choose from {', '.join(map(repr, slices))}")
    if part == "pass" and lens.cfg.d_rotary == lens.cfg.d_head:
        raise ValueError("part is 'pass', but in this model every channel is rotated: ask for 'rotary'")
    return slices[part]


def kv_head_of(lens: Lens, head: Integer) -> int:
    """Return the key-value head of a query head. Raise IndexError for a head that is not there."""
    return read_head(lens, head) // lens.cfg.n_groups


# ---- copying ----


def copying_scores(lens: Lens) -> Labelled:
    """Return sum(λ) / sum(|λ|) over the eigenvalues λ of W_E OV W_U for every head.

    1 copies, -1 suppresses, 0 is chance (Elhage et al. 2021, "Summarizing OV/QK matrices"). The weights of the norms on
    the way (ln1, ln1_post, ln_final) are in it, their scales are not. The matrix is [vocab, vocab] of rank d; its
    eigenvalues are computed from [d, d]. A model without logits over the vocabulary (a class head, or no head) has nan.
    """
    heads, layers = range(lens.cfg.n_heads), range(lens.cfg.n_layers)
    if lens.cfg.head == "vocab":
        unembed_embed = unembed_embed_product(lens)
        scores = [[copying_score(OV(lens, i, head, norms=True), unembed_embed) for head in heads] for i in layers]
    else:
        scores = [[np.nan for _ in heads] for _ in layers]
    about = {"metric": "copying: sum(λ) / sum(|λ|) of W_E OV W_U", "direction": "1 copies the attended token",
             "positions": "none: weights alone", "kv": describe_kv_groups(lens), "model": lens.model_hash}  # fmt: skip
    return Labelled(np.array(scores), ("layer", "head"), {}, about)


def copying_score(ov: Factored, unembed_embed: Float[Tensor, "model model"]) -> float:
    """Return the copying score of one head."""
    # W_E A B W_U and B W_U W_E A have the same eigenvalues, up to zeros.
    values = eigenvalues(ov.B @ unembed_embed @ ov.A)
    return float(values.real.sum() / values.abs().sum())


def unembed_embed_product(lens: Lens) -> Float[Tensor, "model model"]:
    """Return ln_final.weight * W_U W_E, summed over chunks of the vocabulary."""
    pairs = zip(lens.W_U.T.split(VOCAB_CHUNK), lens.W_E.split(VOCAB_CHUNK), strict=True)
    return upcast(lens.model.ln_final.weight)[:, None] * sum(upcast(W_U).T @ upcast(W_E) for W_U, W_E in pairs)


# ---- composition ----


def composition(lens: Lens, kind: str = "K") -> Labelled:
    """Return composition scores between each head's output and later heads' inputs: [writer, reader].

    ‖OV_writer · X‖ / (‖OV_writer‖ ‖X‖) in Frobenius norms, where X is the reader's matrix (Elhage et al. 2021, "Three
    Kinds of Composition"): W_Q W_Kᵀ for "Q", its transpose for "K", W_V W_O for "V". Query heads that share a key-value
    head read keys and values with one matrix, so for K and V the reader is the key-value head, "3.kv1", with the X of
    its heads side by side; for Q it is a head, "3.7". At distance 0, with the norms' weights; nan where the writer is
    not in an earlier layer. Two random circuits have 1 / √d_model. Raises ValueError for another kind.
    """
    if kind not in READER_MATRICES:
        raise ValueError(f"kind is {kind!r}; choose from {', '.join(map(repr, READER_MATRICES))}")
    cfg = lens.cfg
    readers = cfg.n_heads if kind == "Q" else cfg.n_kv_heads
    scores = np.full((cfg.n_layers, cfg.n_heads, cfg.n_layers, readers), np.nan)
    # Of a writer A B only AᵀA [d, d] is needed; see `composition_scores`.
    W = [torch.stack([ov.A.T @ ov.A for ov in OV_circuits(lens, i)]) for i in range(cfg.n_layers)]
    for j in range(cfg.n_layers):
        reads, R = READER_MATRICES[kind](lens, j)
        for i in range(j):
            writes = upcast(lens.W_O[i]) * norm_weight_or_ones(lens.model, i, "ln1_post")
            scores[i, :, j] = to_numpy(composition_scores(W[i], writes, reads, R))
    labels = {
        "writer": [f"{i}.{head}" for i in range(cfg.n_layers) for head in range(cfg.n_heads)],
        "reader": [f"{j}.{'' if kind == 'Q' else 'kv'}{h}" for j in range(cfg.n_layers) for h in range(readers)],
    }
    about = {"metric": f"{kind}-composition", "direction": "0 to 1; the writer is in an earlier layer",
             "positions": "none: weights alone, distance 0", "chance": f"{cfg.d_model**-0.5:.3g} for random circuits",
             "kv": describe_kv_groups(lens), "model": lens.model_hash}  # fmt: skip
    flat = rearrange(scores, "layer head later reader -> (layer head) (later reader)")
    return Labelled(flat, ("writer", "reader"), labels, about)


def composition_scores(
    W: Float[Tensor, "writer d d"],
    writes: Float[Tensor, "writer d model"],
    reads: Float[Tensor, "reader model d"],
    R: Float[Tensor, "reader d d"],
) -> Float[Tensor, "writer reader"]:
    """Return ‖A (B C) D‖ / (‖A B‖ ‖C D‖) from W = AᵀA, writes = B, reads = C, R = D Dᵀ.

    ‖A M D‖² = sum((W M) * (M R)) with M = B C, so no pair needs a matrix larger than [d, d].
    """
    meet = einsum(writes, reads, "writer d model, reader model e -> writer reader d e")
    both = einsum(W, meet, R, meet, "writer c d, writer reader d e, reader e f, writer reader c f -> writer reader")
    BB = einsum(writes, writes, "writer c model, writer d model -> writer c d")
    CC = einsum(reads, reads, "reader model c, reader model d -> reader c d")
    writer_norms = einsum(W, BB, "writer c d, writer c d -> writer")  # squared, as all of these
    reader_norms = einsum(R, CC, "reader c d, reader c d -> reader")
    return (both.clamp(min=0) / (writer_norms[:, None] * reader_norms)).sqrt()


def OV_circuits(lens: Lens, layer: int) -> list[Factored]:
    """Return the OV matrices of a layer's heads, with the norms' weights."""
    return [OV(lens, layer, head, norms=True) for head in range(lens.cfg.n_heads)]


def QK_circuits(lens: Lens, layer: int) -> list[Factored]:
    """Return the QK matrices of a layer's heads at distance 0, with the norms' weights."""
    return [QK(lens, layer, head, norms=True) for head in range(lens.cfg.n_heads)]


ReaderMatrices = tuple[Float[Tensor, "reader model d"], Float[Tensor, "reader d d"]]
"""C and D Dᵀ of every reader's matrix X = C D; see `composition_scores`."""


def query_readers(lens: Lens, layer: int) -> ReaderMatrices:
    """Return the matrices of every query head: X = W_Q W_Kᵀ."""
    circuits = QK_circuits(lens, layer)
    return torch.stack([qk.A for qk in circuits]), torch.stack([qk.B @ qk.B.T for qk in circuits])


def key_readers(lens: Lens, layer: int) -> ReaderMatrices:
    """Return the matrices of every key-value head: X = W_K W_Qᵀ, of the query heads of its group side by side."""
    circuits = QK_circuits(lens, layer)
    reads = torch.stack([qk.B.T for qk in circuits])
    return sum_over_group(lens, reads, torch.stack([qk.A.T @ qk.A for qk in circuits]))


def value_readers(lens: Lens, layer: int) -> ReaderMatrices:
    """Return the matrices of every key-value head: X = W_V W_O, of the query heads of its group side by side."""
    circuits = OV_circuits(lens, layer)
    reads = torch.stack([ov.A for ov in circuits])
    return sum_over_group(lens, reads, torch.stack([ov.B @ ov.B.T for ov in circuits]))


def sum_over_group(lens: Lens, reads: Tensor, R: Tensor) -> ReaderMatrices:
    """Return `reads` once per group, whose heads share it, and R summed: squared norms side by side add up."""
    group = lens.cfg.n_groups
    return reads[::group], rearrange(R, "(kv group) c d -> kv group c d", group=group).sum(1)


READER_MATRICES = {"Q": query_readers, "K": key_readers, "V": value_readers}
