"""What heads do by their weights alone: OV and QK circuits, copying, and composition between heads.

Vectors are rows, as in `x @ W`. Elhage et al. 2021, A Mathematical Framework for Transformer Circuits. Several query
heads share one key-value head here: `head // n_groups` is its number.
"""

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from glmlens.analysis.batch import describe_kv_groups, read_head, read_layer, to_numpy, upcast
from glmlens.analysis.factored import Factored, eigenvalues
from glmlens.integers import Integer, read_integer
from glmlens.lens import Lens
from glmlens.model import RMSNorm, apply_rotary, rotary_angles
from glmlens.results import Labelled

VOCAB_CHUNK = 8192


def OV(lens: Lens, layer: Integer, head: Integer, *, norms: bool = False) -> Factored:
    """W_V W_O: what a head writes for what it reads, [model, model] of rank d. Linear in ln1.normalized.

    b_V W_O is added to it, whatever is read. With `norms`, the weights of ln1 before it and of ln1_post (glm4) after
    it are in it too, so that it stands on the residual stream; the scales, a positive number per position, never are.
    """
    layer, head = read_layer(lens, layer), read_head(lens, head)
    W_V, W_O = upcast(lens.W_V[layer, kv_head_of(lens, head)]), upcast(lens.W_O[layer, head])
    if not norms:
        return Factored(W_V, W_O)
    return Factored(norm_weight(lens, layer, "ln1")[:, None] * W_V, W_O * norm_weight(lens, layer, "ln1_post"))


def QK(
    lens: Lens, layer: Integer, head: Integer, distance: Integer = 0, *, part: str = "all", norms: bool = False
) -> Factored:
    """W_Q R(distance) W_Kᵀ / √d: how strongly a query looks at a key that stands `distance` positions before it.

    [model, model] of rank d (Su et al. 2021, arXiv 2104.09864, section 3.2). `part` is "rotary", the channels that
    turn; "pass", those that do not and so know no distance; or "all", their sum. The score of x at position i and y at
    j is x @ QK(distance=i - j) @ y for normalised x and y, in a model without biases: see `QK_bias`. Raises ValueError
    for a negative distance, at which nothing looks.
    """
    layer, head, distance = read_layer(lens, layer), read_head(lens, head), read_integer(distance, "distance")
    if distance < 0:
        raise ValueError(f"distance is {distance}: a query looks back, at distance 0 or more")
    W_Q, W_K = upcast(lens.W_Q[layer, head]), upcast(lens.W_K[layer, kv_head_of(lens, head)])
    if norms:
        weight = norm_weight(lens, layer, "ln1")[:, None]
        W_Q, W_K = weight * W_Q, weight * W_K
    kept = channel_slice(lens, part)
    W_Q, W_K = rotate_rows(lens, W_Q, distance), rotate_rows(lens, W_K, 0)
    return Factored(W_Q[:, kept] * lens.cfg.d_head**-0.5, W_K[:, kept].T)


def QK_bias(
    lens: Lens, layer: Integer, head: Integer, distance: Integer = 0
) -> tuple[Float[Tensor, "model"], Float[Tensor, "model"], float]:
    """What the biases add to x @ QK @ y: a vector on the query's x, one on the key's y, and a constant.

    The score is x @ QK @ y + x @ on_query + on_key @ y + constant. Zeros in a model without biases.
    """
    layer, head = read_layer(lens, layer), read_head(lens, head)
    distance = read_integer(distance, "distance", least=0)
    W_Q, W_K = upcast(lens.W_Q[layer, head]), upcast(lens.W_K[layer, kv_head_of(lens, head)])
    if not lens.cfg.qkv_bias:
        return W_Q.new_zeros(len(W_Q)), W_Q.new_zeros(len(W_Q)), 0.0
    b_Q, b_K = upcast(lens.b_Q[layer, head]), upcast(lens.b_K[layer, kv_head_of(lens, head)])
    query, b_Q = rotate_rows(lens, W_Q, distance), rotate_rows(lens, b_Q[None], distance)[0]
    key, b_K, scale = rotate_rows(lens, W_K, 0), rotate_rows(lens, b_K[None], 0)[0], lens.cfg.d_head**-0.5
    return query @ b_K * scale, key @ b_Q * scale, float(b_Q @ b_K) * scale


def rotate_rows(lens: Lens, rows: Float[Tensor, "row d"], position: int) -> Float[Tensor, "row d"]:
    """Every row turned as at this position."""
    here = torch.tensor([[position]], device=rows.device)
    cos, sin = rotary_angles(here, lens.cfg, rows.dtype)
    r = lens.cfg.d_rotary
    return torch.cat([apply_rotary(rows[None, None, :, :r], cos, sin)[0, 0], rows[:, r:]], -1)


def channel_slice(lens: Lens, part: str) -> slice:
    found = {"all": slice(None), "rotary": slice(lens.cfg.d_rotary), "pass": slice(lens.cfg.d_rotary, None)}
    if part not in found:
        raise ValueError(f"part is {part!r}; choose from {', '.join(map(repr, found))}")
    if part == "pass" and lens.cfg.d_rotary == lens.cfg.d_head:
        raise ValueError("part is 'pass', but in this model every channel turns: ask for 'rotary'")
    return found[part]


def kv_head_of(lens: Lens, head: Integer) -> int:
    """The key-value head that a query head reads; IndexError for a head that is not there."""
    return read_head(lens, head) // lens.cfg.n_groups


def norm_weight(lens: Lens, layer: int, name: str) -> Float[Tensor, "model"]:
    """The weight of a layer's norm, or ones where there is no such norm."""
    norm = lens.model.blocks[layer].get_submodule(name)
    return upcast(norm.weight) if isinstance(norm, RMSNorm) else upcast(torch.ones_like(lens.model.ln_final.weight))


# ---- copying ----


def copying_scores(lens: Lens) -> Labelled:
    """sum(λ) / sum(|λ|) over the eigenvalues λ of W_E OV W_U, for every head: 1 copies, -1 suppresses, 0 is chance.

    Elhage et al. 2021, "Summarizing OV/QK matrices". With the weights of the norms on the way (ln1, ln1_post, ln_final)
    and without their scales. The matrix is [vocab, vocab] and of rank d: its eigenvalues are found at [d, d]. A model
    that says no tokens, with a class head or with none, copies nothing: nan.
    """
    heads, layers = range(lens.cfg.n_heads), range(lens.cfg.n_layers)
    if lens.cfg.head == "vocab":
        through = unembed_embed_product(lens)
        scores = [[copying_score(OV(lens, i, head, norms=True), through) for head in heads] for i in layers]
    else:
        scores = [[np.nan for _ in heads] for _ in layers]
    about = {"metric": "copying: sum(λ) / sum(|λ|) of W_E OV W_U", "direction": "1 copies the token that it reads",
             "positions": "none: weights alone", "kv": describe_kv_groups(lens), "model": lens.model_hash}  # fmt: skip
    return Labelled(np.array(scores), ("layer", "head"), {}, about)


def copying_score(ov: Factored, unembed_embed: Float[Tensor, "model model"]) -> float:
    found = eigenvalues(ov.B @ unembed_embed @ ov.A)
    return float(found.real.sum() / found.abs().sum())


def unembed_embed_product(lens: Lens) -> Float[Tensor, "model model"]:
    """ln_final.weight * W_U W_E, a chunk of the vocabulary at a time: from what is written to what would read it."""
    pairs = zip(lens.W_U.T.split(VOCAB_CHUNK), lens.W_E.split(VOCAB_CHUNK), strict=True)
    return upcast(lens.model.ln_final.weight)[:, None] * sum(upcast(W_U).T @ upcast(W_E) for W_U, W_E in pairs)


# ---- composition ----


def composition(lens: Lens, kind: str = "K") -> Labelled:
    """How much of what each head writes is what later heads read: [writer, reader], nan where the writer is not before.

    ‖OV_writer · X‖ / (‖OV_writer‖ ‖X‖), Frobenius norms, where X is what the reader does with its input (Elhage et al.
    2021, "Three Kinds of Composition"): W_Q W_Kᵀ for "Q", its transpose for "K", W_V W_O for "V". Query heads that
    share a key-value head read keys and values with one matrix, so for K and V the reader is the key-value head,
    "3.kv1", with the X of its heads side by side; for Q it is a head, "3.7". At distance 0, with the norms' weights.
    Two random circuits have 1 / √d_model. Raises ValueError for another kind.
    """
    if kind not in READER_MATRICES:
        raise ValueError(f"kind is {kind!r}; choose from {', '.join(map(repr, READER_MATRICES))}")
    cfg, readers = lens.cfg, lens.cfg.n_heads if kind == "Q" else lens.cfg.n_kv_heads
    scores = np.full((cfg.n_layers, cfg.n_heads, cfg.n_layers, readers), np.nan)
    W = [torch.stack([ov.A.T @ ov.A for ov in OV_circuits(lens, i)]) for i in range(cfg.n_layers)]
    for j in range(cfg.n_layers):
        reads, R = READER_MATRICES[kind](lens, j)
        for i in range(j):
            writes = upcast(lens.W_O[i]) * norm_weight(lens, i, "ln1_post")
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
    """‖A (B C) D‖ / (‖A B‖ ‖C D‖) from W = AᵀA, writes = B, reads = C, R = D Dᵀ: nothing larger than [d, d] a pair."""
    meet = einsum(writes, reads, "writer d model, reader model e -> writer reader d e")
    both = einsum(W, meet, R, meet, "writer c d, writer reader d e, reader e f, writer reader c f -> writer reader")
    BB = einsum(writes, writes, "writer c model, writer d model -> writer c d")
    CC = einsum(reads, reads, "reader model c, reader model d -> reader c d")
    OV, X = einsum(W, BB, "writer c d, writer c d -> writer"), einsum(R, CC, "reader c d, reader c d -> reader")
    return (both.clamp(min=0) / (OV[:, None] * X)).sqrt()


def OV_circuits(lens: Lens, layer: int) -> list[Factored]:
    return [OV(lens, layer, head, norms=True) for head in range(lens.cfg.n_heads)]


def QK_circuits(lens: Lens, layer: int) -> list[Factored]:
    return [QK(lens, layer, head, norms=True) for head in range(lens.cfg.n_heads)]


ReaderMatrices = tuple[Float[Tensor, "reader model d"], Float[Tensor, "reader d d"]]


def query_readers(lens: Lens, layer: int) -> ReaderMatrices:
    each = QK_circuits(lens, layer)
    return torch.stack([qk.A for qk in each]), torch.stack([qk.B @ qk.B.T for qk in each])


def key_readers(lens: Lens, layer: int) -> ReaderMatrices:
    """Of every key-value head; ‖·‖² over the query heads that share it is the sum of theirs."""
    each = QK_circuits(lens, layer)
    return sum_over_group(lens, torch.stack([qk.B.T for qk in each]), torch.stack([qk.A.T @ qk.A for qk in each]))


def value_readers(lens: Lens, layer: int) -> ReaderMatrices:
    each = OV_circuits(lens, layer)
    return sum_over_group(lens, torch.stack([ov.A for ov in each]), torch.stack([ov.B @ ov.B.T for ov in each]))


def sum_over_group(lens: Lens, reads: Tensor, R: Tensor) -> ReaderMatrices:
    group = lens.cfg.n_groups
    return reads[::group], rearrange(R, "(kv group) c d -> kv group c d", group=group).sum(1)


READER_MATRICES = {"Q": query_readers, "K": key_readers, "V": value_readers}
