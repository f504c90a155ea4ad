"""Edge attribution: against brute force, against identities, and at the size of the real thing."""

import pytest
import torch
from conftest import small_lens
from einops import einsum, repeat

import glmlens
from glmlens import circuits, patch
from glmlens.circuits.graph import Graph
from glmlens.model import additive_mask, apply_rotary, rotary_angles
from glmlens.patch.gradients import record_gradients

DRAW = torch.Generator().manual_seed(0)
CLEAN, CORRUPT = torch.randint(10, 101, (2, 2, 7), generator=DRAW)
PAIR = (5, 9)


def norm(module, x):
    return module.weight * x / (x.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()


def written_apart(lens, embed, offsets=None):
    """A GLM in which every reader has a residual stream of its own, and what every writer writes.

    `offsets` [reader, batch, pos, model] are added to what each reader reads.
    """
    cfg, graph = lens.cfg, Graph.from_config(lens.cfg)
    names = {name: i for i, name in enumerate(graph.readers)}
    positions = torch.arange(embed.shape[1]).expand(len(embed), -1)
    cos, sin = rotary_angles(positions, cfg, embed.dtype)
    mask = additive_mask(positions, positions, embed.dtype)
    resid, out = embed, [embed]

    def read(name):
        return resid if offsets is None else resid + offsets[names[name]]

    def rotated(x):
        return torch.cat([apply_rotary(x[..., : cfg.d_rotary], cos, sin), x[..., cfg.d_rotary :]], -1)

    for i, block in enumerate(lens.model.blocks):
        q, k, v = (
            torch.stack([norm(block.ln1, read(f"{i}.{kind}{n}")) @ W[n] + b[n] for n in range(len(W))], 2)
            for kind, W, b in (
                ("q", lens.W_Q[i], lens.b_Q[i]), ("k", lens.W_K[i], lens.b_K[i]), ("v", lens.W_V[i], lens.b_V[i])
            )
        )  # fmt: skip
        k, v = (repeat(x, "b p kv d -> b p (kv group) d", group=cfg.n_groups) for x in (rotated(k), v))
        pattern = (einsum(rotated(q), k, "b q h d, b k h d -> b h q k") * cfg.d_head**-0.5 + mask).softmax(-1)
        heads = einsum(pattern, v, lens.W_O[i], "b h q k, b k h d, h d m -> b q h m")
        if cfg.sandwich:
            total = heads.sum(2, keepdim=True)
            heads = block.ln1_post.weight * heads / (total.pow(2).mean(-1, keepdim=True) + block.ln1_post.eps).sqrt()
        out += heads.unbind(2)
        resid = resid + heads.sum(2)
        x = norm(block.ln2, read(f"{i}.mlp"))
        x = (torch.nn.functional.silu(x @ lens.W_gate[i]) * (x @ lens.W_up[i])) @ lens.W_down[i]
        mlp = norm(block.ln2_post, x) if cfg.sandwich else x
        out.append(mlp)
        resid = resid + mlp
    return norm(lens.model.ln_final, read("logits")) @ lens.W_U, torch.stack(out)


def difference(logits):
    return logits[:, -1, PAIR[0]] - logits[:, -1, PAIR[1]]


def brute_force(lens, embed_at):
    """Every edge's score from one autograd through readers with streams of their own."""
    graph = Graph.from_config(lens.cfg)
    one, other = (lens.W_E[tokens] for tokens in (CLEAN, CORRUPT))
    a, b = (written_apart(lens, embed)[1] for embed in (one, other))
    offsets = torch.zeros(len(graph.readers), *one.shape, dtype=one.dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(difference(written_apart(lens, embed_at, offsets)[0]).sum(), offsets)
    scores = einsum(slope, b - a, "reader batch pos model, writer batch pos model -> reader writer")
    return scores * graph.mask / len(CLEAN)


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_edge_scores_equal_brute_force(model_type, attention):
    lens = small_lens(model_type, attention, torch.float64)
    one = lens.W_E[CLEAN]
    torch.testing.assert_close(written_apart(lens, one)[0], lens(CLEAN), rtol=1e-12, atol=1e-12)
    found = circuits.attribute_edges(lens, CLEAN, CORRUPT, metric=PAIR)
    expected = brute_force(lens, one)
    assert float((found.scores - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
    other = lens.W_E[CORRUPT]
    found = circuits.attribute_edges(lens, CLEAN, CORRUPT, metric=PAIR, method="eap-ig", steps=3)
    expected = sum(brute_force(lens, other + a * (one - other)) for a in (1 / 6, 1 / 2, 5 / 6)) / 3
    assert float((found.scores - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_the_edges_of_a_writer_sum_to_its_attribution(model_type):
    lens = small_lens(model_type, dtype=torch.float64)
    found = circuits.attribute_edges(lens, CLEAN, CORRUPT, metric=PAIR)
    graph = found.graph
    names = ["embed", *(f"blocks.{i}.{p}" for i in range(3) for p in ("mlp_out", "attn_out"))]
    metric = patch.Metric("difference", lambda logits, _: difference(logits))
    slopes = record_gradients(lens, CLEAN, metric, names).gradients
    for name, place in (("embed", "embed"), *((f"{i}.mlp", f"blocks.{i}.mlp_out") for i in range(3))):
        a, b = (lens.run_with_cache(tokens, place)[1][place] for tokens in (CLEAN, CORRUPT))
        node = float(((b - a) * slopes[place]).sum()) / 2
        assert float(found.scores[:, graph.writers.index(name)].sum()) == pytest.approx(node, rel=1e-10)
    for i in range(3):  # the heads of a layer together are its attention
        a, b = (lens.run_with_cache(t, "attn_out")[1]["attn_out", i] for t in (CLEAN, CORRUPT))
        heads = [graph.writers.index(f"{i}.head{h}") for h in range(4)]
        node = float(((b - a) * slopes[f"blocks.{i}.attn_out"]).sum()) / 2
        assert float(found.scores[:, heads].sum()) == pytest.approx(node, rel=1e-10)


def test_integrated_gradients_are_complete_in_the_limit():
    lens = small_lens(dtype=torch.float64)
    found = [circuits.attribute_edges(lens, CLEAN, CORRUPT, metric=PAIR, method="eap-ig", steps=n) for n in (80, 160)]
    change = float((difference(lens(CORRUPT)) - difference(lens(CLEAN))).mean())
    missing = [float(scores.scores[:, 0].sum()) - change for scores in found]
    assert missing[0] / missing[1] == pytest.approx(4, rel=0.05)  # the midpoint rule: half the step, a quarter missing
    assert found[1].completeness == pytest.approx(abs(missing[1] / change))
    assert found[1].completeness < 1e-3
    assert "not accounted for" in found[1].about["completeness"]


def test_the_graph_of_glm_4_9b_is_enumerable():
    graph = Graph(40, 32, 2)
    assert graph.n_edges == 956_461 == int(graph.mask.sum())
    assert sum(1 for _ in graph.edges()) == 956_461
    first, *_, last = graph.edges()
    assert (first, last) == (("embed", "0.q0"), ("39.mlp", "logits"))


def test_a_slice_of_glm_4_9b_is_scored():
    """Four layers of its own shape, and a vocabulary of 1,000."""
    torch.manual_seed(0)
    cfg = glmlens.GLMConfig.from_dict(
        {"model_type": "glm", "vocab_size": 1000, "hidden_size": 4096, "intermediate_size": 13696,
         "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
    )  # fmt: skip
    with torch.device("meta"):
        model = glmlens.GLM(cfg)
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 else torch.nn.init.ones_(p)
    lens = glmlens.Lens(model)
    found = circuits.attribute_edges(lens, CLEAN[:1, :4], CORRUPT[:1, :4], metric=PAIR)
    assert found.graph.n_edges == int((found.scores != 0).sum()) == Graph(4, 32, 2).n_edges
    assert bool(found.scores.isfinite().all())
    assert found[found.top(1)[0][0]] == found.top(1)[0][1]


def test_pairs_of_other_lengths_and_methods_are_refused(lens):
    with pytest.raises(patch.PatchError, match="differ from token"):
        circuits.attribute_edges(lens, CLEAN, CORRUPT[:, :5], metric=PAIR)
    with pytest.raises(patch.PatchError, match="choose 'eap'"):
        circuits.attribute_edges(lens, CLEAN, CORRUPT, metric=PAIR, method="ig")
    with pytest.raises(KeyError, match="writes later"):
        circuits.attribute_edges(lens, CLEAN, CORRUPT, metric=PAIR)["2.mlp", "1.q0"]
