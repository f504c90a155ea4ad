"""Token ids to logits, top to bottom: the GLM language models in the order in which data flows.

Every named quantity passes through `hook` once; with `off`, the default, that is the identity. Axes are words, the same
in every einops string: batch pos query key model head kv group d pair rotated rest mlp vocab one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from glmlens.config import GLMConfig
from glmlens.dtypes import at_least_float32, upcast
from glmlens.hooks import Hook, hook_requests, off, scope_hook
from glmlens.kv_cache import KVCache, LayerKV
from glmlens.rotary_frequencies import rope_frequencies

Resid = Float[Tensor, "batch pos model"]
Angles = tuple[Float[Tensor, "batch pos pair"], Float[Tensor, "batch pos pair"]]


class GLM(nn.Module):
    """A GLM: `model(tokens)` returns the logits [batch, pos, vocab] of the published model.

    With a class head, `vocab` are its labels; without a head, the normalised residual stream is returned. The output
    depends on the arguments alone. `attention` is "eager" (scores and pattern are hook points) or "sdpa" (one fused
    kernel); hooks never change it.
    """

    def __init__(self, cfg: GLMConfig, attention: str = "eager"):
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"attention is {attention!r}; choose from {', '.join(map(repr, ATTENTION))}")
        self.cfg = cfg
        self.attention = attention
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, attention) for _ in range(cfg.n_layers))
        self.ln_final = RMSNorm(cfg)
        self.unembed = Unembed(cfg) if cfg.d_logits else Identity()
        if cfg.tied:
            self.unembed.weight = self.embed.weight

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos model"] | None = None,
        kv: KVCache | None = None,
        hook: Hook = off,
        *,
        start_layer: int = 0,
        stop_layer: int | None = None,
        position_ids: Int[Tensor, "#batch pos"] | Int[Tensor, "pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | Bool[Tensor, "batch pos"] | None = None,
        inputs_embeds: Float[Tensor, "batch pos model"] | None = None,
        logits_to_keep: int | Tensor | None = None,
    ) -> Float[Tensor, "batch kept vocab"] | Resid:
        """Return logits, or with `stop_layer` the residual stream that enters that layer.

        `tokens` are ids, or (floats) the residual stream that enters `start_layer`. This call's keys and values are
        appended to `kv`. `attention_mask` is 0 at padding. `position_ids` default to the real tokens counted from the
        cache's end. A query attends to the real keys up to its own position. `logits_to_keep`: the last n positions
        (0 or None: all), or indices into pos. Raises ValueError for arguments that do not fit together.
        """
        layers = self.layers(start_layer, stop_layer)
        resid = self.embed_inputs(tokens, inputs_embeds, start_layer, hook)

        if kv is not None:
            kv.check_fits(self.cfg, resid)
        positions = absolute_positions(resid.shape[:2], resid.device, kv, position_ids, attention_mask)
        key_positions = positions if kv is None else kv.reserve(positions, tokens)
        plain = self.attention == "sdpa" and kv is None and position_ids is None and attention_mask is None
        mask = (
            None if plain else additive_mask(positions, key_positions, resid.dtype)
        )  # sdpa has a causal mask of its own
        angles = rotary_angles(positions, self.cfg, resid.dtype)

        for i in layers:
            resid = self.blocks[i](resid, angles, mask, kv and kv.layer(i), scope_hook(hook, f"blocks.{i}"))
        if stop_layer is None:
            final = hook("ln_final.normalized", self.ln_final(resid, scope_hook(hook, "ln_final")))
            resid = self.unembed(select_logit_positions(final, logits_to_keep), hook)
        if kv is not None and len(layers) == len(self.blocks):
            kv.length += positions.shape[1]  # only a run over all layers fills the cache
        return resid

    def layers(self, start: int, stop: int | None) -> range:
        """Return the layers from `start` to before `stop`; ValueError if this model does not have them."""
        stop = len(self.blocks) if stop is None else stop
        if not 0 <= start <= stop <= len(self.blocks):
            raise ValueError(f"layers {start} to {stop} asked for; this model has 0 to {len(self.blocks)}")
        return range(start, stop)

    def embed_inputs(self, tokens: Tensor | None, inputs_embeds: Tensor | None, start_layer: int, hook: Hook) -> Resid:
        """Return the residual stream at the start: embedded tokens, the embeddings given, or the stream given."""
        if inputs_embeds is not None:
            if tokens is not None or start_layer:
                raise ValueError("inputs_embeds stand for tokens and enter at layer 0: give neither with them")
            return hook("embed", inputs_embeds)
        if tokens is not None and tokens.is_floating_point() and tokens.ndim == 3:
            return tokens
        if tokens is None or tokens.is_floating_point() or start_layer:
            raise ValueError("give token ids, inputs_embeds, or a residual stream [batch, pos, model] with start_layer")
        return hook("embed", self.embed(tokens))


class Block(nn.Module):
    """One layer: attention and an MLP, which read the normalised residual stream and add their outputs to it."""

    def __init__(self, cfg: GLMConfig, attention: str):
        super().__init__()
        self.ln1, self.ln2 = RMSNorm(cfg), RMSNorm(cfg)
        self.attn, self.mlp = Attention(cfg, attention), MLP(cfg)
        self.ln1_post, self.ln2_post = (RMSNorm(cfg), RMSNorm(cfg)) if cfg.sandwich else (Identity(), Identity())

    def forward(self, resid: Resid, angles: Angles, mask: Tensor | None, kv: LayerKV | None, hook: Hook) -> Resid:
        resid_pre = hook("resid_pre", resid)
        x = hook("ln1.normalized", self.ln1(resid_pre, scope_hook(hook, "ln1")))
        attn_out = hook("attn_out", self.ln1_post(self.attn(x, angles, mask, kv, hook), scope_hook(hook, "ln1_post")))
        resid_mid = hook("resid_mid", resid_pre + attn_out)
        x = hook("ln2.normalized", self.ln2(resid_mid, scope_hook(hook, "ln2")))
        mlp_out = hook("mlp_out", self.ln2_post(self.mlp(x, hook), scope_hook(hook, "ln2_post")))
        return hook("resid_post", resid_mid + mlp_out)


class Attention(nn.Module):
    """Grouped-query attention with rotary position embeddings on the first `d_rotary` channels of every head.

    Ainslie et al. 2023 (arXiv 2305.13245); Su et al. 2021 (arXiv 2104.09864), section 3.2, on adjacent channels.
    """

    def __init__(self, cfg: GLMConfig, attention: str):
        super().__init__()
        self.query = nn.Linear(cfg.d_model, cfg.n_heads * cfg.d_head, bias=cfg.qkv_bias)
        self.key = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.d_head, bias=cfg.qkv_bias)
        self.value = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.d_head, bias=cfg.qkv_bias)
        self.out = nn.Linear(cfg.n_heads * cfg.d_head, cfg.d_model, bias=False)
        self.d_head, self.d_rotary = cfg.d_head, cfg.d_rotary
        self.attend = ATTENTION[attention]

    def forward(self, x: Resid, angles: Angles, mask: Tensor | None, kv: LayerKV | None, hook: Hook) -> Resid:
        q = hook("attn.q", rearrange(self.query(x), "batch pos (head d) -> batch pos head d", d=self.d_head))
        k = hook("attn.k", rearrange(self.key(x), "batch pos (kv d) -> batch pos kv d", d=self.d_head))
        v = hook("attn.v", rearrange(self.value(x), "batch pos (kv d) -> batch pos kv d", d=self.d_head))

        cos, sin = hook("rotary.cos", angles[0]), hook("rotary.sin", angles[1])
        q_rot = hook("attn.q_rot", apply_rotary(q[..., : self.d_rotary], cos, sin))
        k_rot = hook("attn.k_rot", apply_rotary(k[..., : self.d_rotary], cos, sin))
        if self.d_rotary < self.d_head:  # the other channels are not rotated
            q_rot = torch.cat([q_rot, hook("attn.q_pass", q[..., self.d_rotary :])], -1)
            k_rot = torch.cat([k_rot, hook("attn.k_pass", k[..., self.d_rotary :])], -1)

        k, v = hook("kv.k_new", k_rot), hook("kv.v_new", v)
        if kv is not None:
            k, v = kv.update(k, v)
        k, v = hook("kv.k", k), hook("kv.v", v)

        z = hook("attn.z", self.attend(q_rot, k, v, mask, hook))
        out = self.out(rearrange(z, "batch pos head d -> batch pos (head d)"))
        if hook_requests(hook, "attn.result"):
            W_O = rearrange(self.out.weight, "model (head d) -> head d model", d=self.d_head)
            result = einsum(z, W_O, "batch pos head d, head d model -> batch pos head model")
            out = out + (hook("attn.result", result) - result).sum(2)  # recording changes no bit of out
        return out


def eager(
    q: Float[Tensor, "batch query head d"],
    k: Float[Tensor, "batch key kv d"],
    v: Float[Tensor, "batch key kv d"],
    mask: Float[Tensor, "batch one query key"],
    hook: Hook,
) -> Float[Tensor, "batch query head d"]:
    """Return softmax(QKᵀ/√d)V, computed one operation at a time."""
    group = q.shape[2] // k.shape[2]
    q = rearrange(q, "batch query head d -> batch head query d").contiguous()
    k, v = (rearrange(t, "batch key kv d -> batch kv key d").contiguous() for t in (k, v))
    k, v = (repeat(t, "batch kv key d -> batch (kv group) key d", group=group) for t in (k, v))
    scores = einsum(q, k, "batch head query d, batch head key d -> batch head query key") * q.shape[-1] ** -0.5
    scores = hook("attn.scores", scores + mask)
    pattern = hook("attn.pattern", softmax(scores, v.dtype))
    return einsum(pattern, v, "batch head query key, batch head key d -> batch query head d")


def softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the softmax over the last axis in `dtype`, computed in at least float32."""
    return scores.softmax(-1, dtype=at_least_float32(scores.dtype)).to(dtype)


def sdpa(
    q: Float[Tensor, "batch query head d"],
    k: Float[Tensor, "batch key kv d"],
    v: Float[Tensor, "batch key kv d"],
    mask: Float[Tensor, "batch one query key"] | None,
    hook: Hook,
) -> Float[Tensor, "batch query head d"]:
    """Return softmax(QKᵀ/√d)V from PyTorch's fused kernel, which returns no scores and no pattern to hook."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # batch head query d, batch kv key d
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return z.transpose(1, 2)


def additive_mask(
    positions: Int[Tensor, "batch query"], key_positions: Int[Tensor, "batch key"], dtype: torch.dtype
) -> Float[Tensor, "batch one query key"]:
    """Return 0 at the real keys up to a query's own position, and the smallest float at all others."""
    query = rearrange(positions, "batch query -> batch 1 query 1")
    key = rearrange(key_positions, "batch key -> batch 1 1 key")
    zero = torch.zeros((), dtype=dtype, device=positions.device)
    return torch.where((key >= 0) & (key <= query), zero, torch.finfo(dtype).min)


ATTENTION = {"eager": eager, "sdpa": sdpa}


def rotary_angles(positions: Int[Tensor, "batch pos"], cfg: GLMConfig, dtype: torch.dtype) -> Angles:
    """Return cos and sin of position · frequency, computed in at least float32 and rounded to dtype; see `rope`."""
    frequency, factor = rope_frequencies(cfg, at_least_float32(dtype), positions.device)
    angles = rearrange(positions.clamp(min=0).to(frequency.dtype), "batch pos -> batch pos 1") * frequency
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def apply_rotary(
    x: Float[Tensor, "batch pos head rotated"],
    cos: Float[Tensor, "batch pos pair"],
    sin: Float[Tensor, "batch pos pair"],
) -> Float[Tensor, "batch pos head rotated"]:
    """Rotate each adjacent pair (a, b) of channels by its angle."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # the same angles for every head
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


class MLP(nn.Module):
    """SwiGLU, with gate and linear half in one matrix (Shazeer 2020, arXiv 2002.05202, section 2)."""

    def __init__(self, cfg: GLMConfig):
        super().__init__()
        self.gate_up = nn.Linear(cfg.d_model, 2 * cfg.d_mlp, bias=False)
        self.down = nn.Linear(cfg.d_mlp, cfg.d_model, bias=False)

    def forward(self, x: Resid, hook: Hook) -> Resid:
        gate, up = rearrange(self.gate_up(x), "batch pos (two mlp) -> two batch pos mlp", two=2)
        gate, up = hook("mlp.gate", gate), hook("mlp.up", up)
        act = hook("mlp.act", F.silu(gate))
        post = hook("mlp.post", up * act)
        return self.down(post)


class RMSNorm(nn.Module):
    """weight · x / √(mean x² + eps), rounded to x's dtype before the weight (Zhang & Sennrich 2019, 1910.07467)."""

    def __init__(self, cfg: GLMConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(cfg.d_model))
        self.eps = cfg.rms_eps

    def forward(self, x: Resid, hook: Hook = off) -> Resid:
        exact = upcast(x)
        scale = hook("scale", torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps))
        return self.weight * (exact * scale).to(x.dtype)


class Unembed(nn.Linear):
    """The unembedding: one logit per token of the vocabulary, or per label of a class head."""

    def __init__(self, cfg: GLMConfig):
        super().__init__(cfg.d_model, cfg.d_logits, bias=cfg.head_bias)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Resid, hook: Hook = off
    ) -> Float[Tensor, "batch pos vocab"]:
        # The last positions of several prompts are not contiguous. PyTorch then multiplies prompt by prompt, and its
        # bfloat16 CPU kernel copies the whole weight for each; multiplying one prompt at a time copies nothing.
        if x.dtype == torch.bfloat16 and x.is_cpu and self.bias is None and x.stride(0) != x.shape[1] * x.shape[2]:
            return hook("logits", torch.stack([F.linear(row, self.weight) for row in x]))
        return hook("logits", F.linear(x, self.weight, self.bias))


class Identity(nn.Module):
    """Returns its input: the place of a norm that `glm4` has and `glm` has not, or of a missing unembedding."""

    def forward(self, x: Resid, hook: Hook = off) -> Resid:
        return x


def absolute_positions(
    shape: Sequence[int],
    device: torch.device,
    kv: KVCache | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Int[Tensor, "batch pos"]:
    """Return the absolute position of every token of a call, -1 for padding; by default the real tokens count up."""
    batch, pos = shape
    if attention_mask is not None and attention_mask.shape != (batch, pos):
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; this call's tokens are {(batch, pos)}")
    if position_ids is not None and position_ids.shape not in ((batch, pos), (1, pos), (pos,)):
        raise ValueError(f"position_ids are {tuple(position_ids.shape)}; this call's tokens are {(batch, pos)}")
    if position_ids is None:
        start = 0 if kv is None else rearrange(kv.next_positions(), "batch -> batch 1")
        counted = torch.arange(pos, device=device) if attention_mask is None else attention_mask.long().cumsum(1) - 1
        position_ids = start + counted
    if attention_mask is not None:
        position_ids = torch.where(attention_mask.bool(), position_ids, -1)
    return position_ids.expand(batch, pos)


def select_logit_positions(
    x: Shaped[Tensor, "batch pos *rest"], logits_to_keep: int | Tensor | None
) -> Shaped[Tensor, "batch kept *rest"]:
    """Return `x` at the positions in `logits_to_keep`: the last n (0 or None: all), or indices into pos."""
    if logits_to_keep is None:
        return x
    if isinstance(logits_to_keep, Tensor):
        return x[:, logits_to_keep]
    if logits_to_keep < 0:
        raise ValueError(f"logits_to_keep is {logits_to_keep}; expected a number of last positions, or indices")
    return x[:, -logits_to_keep:]
