"""Scores of attention heads, and their circuits from the weights alone."""

import numpy as np
import pytest
import torch
from conftest import small_lens, write_checkpoint
from torch.testing import assert_close

import glmlens
from glmlens import analysis
from glmlens.analysis.heads import RepeatedWordPatterns

SCORES = ["previous", "duplicate", "induction", "prefix_matching"]


@pytest.fixture(scope="module")
def demo():
    return glmlens.load(dtype="float32")


# ---- scores ----


def test_uniform_attention_has_the_score_of_chance(demo):
    lens = glmlens.load(dtype="float32")
    for block in lens.model.blocks:
        block.attn.query.weight.zero_()
        block.attn.query.bias.zero_()
    found = analysis.head_scores(lens, rows=2, length=9)
    for name in [*SCORES, "on_prefix"]:
        scores = found.sheets()[name].values
        assert np.allclose(scores, found.chance[name], atol=1e-6), name
        assert found.sheets()[name].about["chance"] == f"{found.chance[name]:.3g}"


def test_chance_is_a_count_of_visible_keys(demo):
    found, length, first = analysis.head_scores(demo, length=9), 9, 2
    ends = range(first + length, first + 2 * length)  # the second time that the words occur
    expected = sum(1 / (t + 1) for t in ends) / sum((t + 1 - first) / (t + 1) for t in ends)
    assert found.chance["induction"] == pytest.approx(expected)
    assert found.chance["duplicate"] == pytest.approx(expected)
    assert found.chance["copying"] == 0


def repeated(pattern, prefix, length, times):
    """A run in which every head has this pattern [query, key]."""
    word = torch.cat([torch.arange(-prefix, 0), torch.arange(length).repeat(times)])
    return RepeatedWordPatterns([pattern.expand(3, 2, *pattern.shape)], word)


def attending(offsets, prefix, length, times, share=1.0):
    """Half or all of the attention at these distances back, the rest on the first token of the prefix."""
    n = prefix + length * times
    pattern = torch.zeros(n, n)
    for t in range(n):
        hit = [t - offset for offset in offsets if t - offset >= prefix]
        pattern[t, 0] = 1 - (share if hit else 0)
        for key in hit:
            pattern[t, key] += share / len(hit)
    return pattern


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_head_of_one_kind_has_the_score_one_of_that_kind_whatever_goes_to_the_prefix(share):
    shape = {"prefix": 2, "length": 7, "times": 2}
    for kind, offset in (("previous", 1), ("same", 7), ("after_same", 6)):
        run = repeated(attending([offset], **shape, share=share), **shape)
        masks = {
            "previous": run.previous_mask(),
            "same": run.same_word_mask(),
            "after_same": run.after_same_word_mask(),
        }
        found = run.measure_shares(masks)
        for name, (scores, _) in found.items():
            assert_close(scores, torch.full((1, 2), float(name == kind))), (kind, name)
        assert float(run.measure_prefix_share()[0].min()) >= 1 - share


def test_prefix_matching_counts_the_word_after_every_earlier_occurrence():
    shape = {"prefix": 2, "length": 5, "times": 4}
    pattern = attending([4, 9, 14], **shape)
    pattern[:, 2] = 0  # the first word follows no other word
    run = repeated(pattern, **shape)
    assert_close(run.measure_shares({"x": run.after_same_word_mask()})["x"][0], torch.ones(1, 2))
    pattern = attending([9], **shape)
    pattern[:, 2] = 0
    assert_close(run.attention_share(pattern[None, None], run.after_same_word_mask()), torch.ones(1))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_scores_are_those_of_a_loop_over_the_patterns(attention):
    lens = small_lens("glm4", attention)
    eager = small_lens("glm4")
    found = analysis.head_scores(lens, rows=3, length=6, seed=5, words=range(10, 40))
    draw = torch.Generator().manual_seed(5)
    words = torch.stack([torch.arange(10, 40)[torch.randperm(30, generator=draw)[:6]] for _ in range(3)])
    for times, names in ((2, SCORES[:3]), (4, SCORES[3:])):
        tokens = words.repeat(1, times)
        _, acts = eager.run_with_cache(tokens, "attn.pattern")
        for name in names:
            expected = np.zeros((lens.cfg.n_layers, lens.cfg.n_heads))
            for i, h in np.ndindex(*expected.shape):
                hits, asked = 0.0, 0.0
                for row, t in np.ndindex(*tokens.shape):
                    if name == "previous":
                        keys = [t - 1] if t else []
                    elif name == "duplicate":
                        keys = [t - 6] if t >= 6 else []
                    else:
                        keys = [k for k in range(1, t + 1) if tokens[row, k - 1] == tokens[row, t]]
                    pattern = acts["attn.pattern", i][row, h, t]
                    hits, asked = hits + float(sum(pattern[k] for k in keys)), asked + float(pattern.sum()) * bool(keys)
                expected[i, h] = hits / asked
            assert np.allclose(found.sheets()[name].values, expected, atol=1e-5), name


def test_scores_name_the_heads_of_the_model_inside(demo):
    found = analysis.head_scores(demo)
    layer, head, score = found.best("induction", 1)[0]
    assert layer > 0  # in the first layer nothing can have moved yet (Elhage et al. 2021)
    assert score > 3 * found.chance["induction"]
    assert found.best("previous", 1)[0][2] > 5 * found.chance["previous"]
    assert "previous" in repr(found)
    assert "by chance" in repr(found)
    assert found.about["kv"] == "kv 0: heads 0-1; kv 1: heads 2-3; kv 2: heads 4-5; kv 3: heads 6-7"
    assert analysis.head_scores(demo).induction.values[layer, head] == pytest.approx(score)  # the same seed


@pytest.mark.weights
def test_a_real_model_has_its_known_kinds_of_heads(real_model):
    found = analysis.head_scores(glmlens.load(real_model, dtype="float32"))
    assert found.best("previous", 1)[0][2] > 0.8
    assert found.best("induction", 1)[0][2] > 0.7
    assert found.best("induction", 1)[0][:2] == found.best("prefix_matching", 1)[0][:2]


def test_words_can_be_chosen(demo):
    words = demo.tokenizer.list_words()[:30]
    texts = analysis.head_scores(demo, words=words)
    ids = analysis.head_scores(demo, words=[demo.to_single_token(word) for word in words])
    assert np.array_equal(texts.induction.values, ids.induction.values)
    with pytest.raises(ValueError, match="length is 20, and there are 3 different words: give 2 to 3"):
        analysis.head_scores(demo, words=words[:3])


# ---- circuits ----


@pytest.mark.parametrize("seed", range(8))
def test_qk_at_a_distance_is_the_score(tmp_path, seed):
    write_checkpoint(tmp_path, seed, torch.float64)
    lens = glmlens.load(tmp_path)
    tokens = torch.randint(0, lens.cfg.d_vocab, (1, 7), generator=torch.Generator().manual_seed(seed))
    _, acts = lens.run_with_cache(tokens, ["ln1.normalized", "attn.scores"])
    for layer, head in np.ndindex(lens.cfg.n_layers, lens.cfg.n_heads):
        x = acts["ln1.normalized", layer][0]
        for i, j in [(0, 0), (4, 1), (6, 6), (6, 0)]:
            qk = analysis.QK(lens, layer, head, distance=i - j)
            on_query, on_key, constant = analysis.QK_bias(lens, layer, head, distance=i - j)
            score = x[i] @ qk @ x[j] + x[i] @ on_query + on_key @ x[j] + constant
            assert_close(score, acts["attn.scores", layer][0, head, i, j], rtol=0, atol=1e-9)


def test_rotated_and_unrotated_channels_add_up(lens):
    whole, rotary, rest = (analysis.QK(lens, 1, 2, 5, part=part) for part in ("all", "rotary", "pass"))
    x = torch.randn(6, lens.cfg.d_model)
    assert_close(x @ whole, x @ rotary + x @ rest)
    near, far = (analysis.QK(lens, 1, 2, distance, part="pass") for distance in (0, 40))
    assert torch.equal(near.A, far.A)
    assert not torch.allclose(rotary.A, analysis.QK(lens, 1, 2, 6, part="rotary").A)
    fully_rotated = small_lens(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 1.0})
    with pytest.raises(ValueError, match="every channel is rotated"):
        analysis.QK(fully_rotated, 0, 0, part="pass")
    with pytest.raises(ValueError, match="distance is -1"):
        analysis.QK(lens, 0, 0, -1)
    with pytest.raises(IndexError, match="head 4 asked for; there are 0 to 3"):
        analysis.OV(lens, 0, 4)


def test_ov_maps_what_a_head_attends_to_to_its_output(tokens):
    lens = small_lens("glm")
    _, acts = lens.run_with_cache(tokens, ["ln1.normalized", "attn.pattern", "attn.result"])
    for layer, head in np.ndindex(lens.cfg.n_layers, lens.cfg.n_heads):
        read = acts["attn.pattern", layer][:, head] @ acts["ln1.normalized", layer]
        bias = lens.b_V[layer, head // lens.cfg.n_groups] @ lens.W_O[layer, head]
        assert_close(read @ analysis.OV(lens, layer, head) + bias, acts["attn.result", layer][:, :, head])


def test_norms_stand_where_a_circuit_meets_the_residual_stream():
    lens = small_lens("glm4")
    x = torch.randn(5, lens.cfg.d_model)
    block = lens.model.blocks[1]
    inside = (x * block.ln1.weight) @ analysis.OV(lens, 1, 3) * block.ln1_post.weight
    assert_close(x @ analysis.OV(lens, 1, 3, norms=True), inside)


def test_a_factored_matrix_equals_the_dense_product():
    draw = torch.Generator().manual_seed(0)
    A, B, C = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((12, 4), (4, 12), (12, 3)))
    F, G = analysis.Factored(A, B), analysis.Factored(C, C.T)
    dense = A @ B
    U, S, Vh = F.svd()
    assert F.shape == (12, 12)
    assert_close(U @ torch.diag(S) @ Vh, dense)
    assert_close(S, torch.linalg.svdvals(dense)[:4])
    assert_close(U.T @ U, torch.eye(4, dtype=torch.float64))
    assert_close(F.norm(), torch.linalg.norm(dense))
    theirs = np.linalg.eigvals(dense.numpy())
    theirs = theirs[np.argsort(-np.abs(theirs))][:4]
    assert np.allclose(np.sort_complex(F.eigenvalues().numpy()), np.sort_complex(theirs))
    x = torch.randn(12, generator=draw, dtype=torch.float64)
    assert_close(x @ F, x @ dense)
    assert_close(F @ x, dense @ x)
    assert_close((F.T @ x), dense.T @ x)
    both = F @ G
    assert both.A.shape[1] == 3  # the smaller rank
    assert_close(both.A @ both.B, dense @ C @ C.T)
    assert_close((G @ F).A @ (G @ F).B, C @ C.T @ dense)
    assert_close((F * 2.0) @ x, 2 * dense @ x)
    with pytest.raises(TypeError, match="not multiplied out"):
        np.asarray(F)
    with pytest.raises(ValueError, match="have no product"):
        analysis.Factored(A, C)
    with pytest.raises(ValueError, match="square"):
        (analysis.Factored(A, B[:, :5])).eigenvalues()


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_copying_is_that_of_the_full_matrix_over_the_vocabulary(model_type):
    lens = small_lens(model_type, dtype=torch.float64)
    found = analysis.copying_scores(lens).values
    for layer, head in np.ndindex(*found.shape):
        block = lens.model.blocks[layer]
        written = lens.W_V[layer, head // lens.cfg.n_groups] @ lens.W_O[layer, head]
        if model_type == "glm4":
            written = written * block.ln1_post.weight
        whole = (lens.W_E * block.ln1.weight) @ written @ (lens.model.ln_final.weight[:, None] * lens.W_U)
        eigenvalues = np.linalg.eigvals(whole.numpy())
        assert found[layer, head] == pytest.approx(eigenvalues.sum().real / np.abs(eigenvalues).sum(), abs=1e-9)


def test_a_head_that_copies_has_the_score_one():
    lens = small_lens(tie_word_embeddings=True, attention_bias=False)
    block = lens.model.blocks[0]
    block.attn.out.weight.copy_(torch.cat([block.attn.value.weight[:16]] * 2 + [block.attn.value.weight[16:]] * 2).T)
    lens.model.ln_final.weight.fill_(1)
    block.ln1.weight.fill_(1)
    assert np.allclose(analysis.copying_scores(lens).values[0], 1, atol=1e-5)


# ---- composition ----


def dense(lens, layer, head):
    weight = lens.model.blocks[layer].ln1.weight[:, None]
    after = lens.model.blocks[layer].ln1_post.weight if lens.cfg.sandwich else 1.0
    kv = head // lens.cfg.n_groups
    ov = weight * (lens.W_V[layer, kv] @ lens.W_O[layer, head]) * after
    qk = weight * (lens.W_Q[layer, head] @ lens.W_K[layer, kv].T) * weight.T
    return ov, qk


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_composition_is_the_ratio_of_norms(model_type, kind):
    lens = small_lens(model_type, dtype=torch.float64)
    cfg, found = lens.cfg, analysis.composition(lens, kind)
    readers = cfg.n_heads if kind == "Q" else cfg.n_kv_heads
    assert found.shape == (cfg.n_layers * cfg.n_heads, cfg.n_layers * readers)
    for i, h, j, r in np.ndindex(cfg.n_layers, cfg.n_heads, cfg.n_layers, readers):
        place = {"writer": f"{i}.{h}", "reader": f"{j}.{'' if kind == 'Q' else 'kv'}{r}"}
        if i >= j:
            assert np.isnan(found.at(**place))
            continue
        written = dense(lens, i, h)[0]
        group = [r] if kind == "Q" else range(r * cfg.n_groups, (r + 1) * cfg.n_groups)
        read = [dense(lens, j, head) for head in group]
        X = torch.cat([{"Q": qk, "K": qk.T, "V": ov}[kind] for ov, qk in read], 1)
        expected = (written @ X).norm() / (written.norm() * X.norm())
        assert found.at(**place) == pytest.approx(float(expected), rel=1e-9)


def test_random_circuits_compose_by_chance():
    lens = small_lens(attention_bias=False)
    for block in lens.model.blocks:
        block.ln1.weight.fill_(1)
    for kind in "QKV":
        found = analysis.composition(lens, kind)
        assert np.nanmean(found.values) == pytest.approx(lens.cfg.d_model**-0.5, rel=0.15)
        assert found.about["chance"] == f"{lens.cfg.d_model**-0.5:.3g} for random circuits"
    with pytest.raises(ValueError, match="kind is 'k'; choose from 'Q', 'K', 'V'"):
        analysis.composition(lens, "k")


def test_many_heads_on_few_keys_are_not_padded():
    lens = small_lens(num_attention_heads=32, num_key_value_heads=2, head_dim=8, hidden_size=64, num_hidden_layers=2)
    found = analysis.composition(lens, "V")
    assert found.shape == (64, 4)
    assert found.labels["reader"] == ["0.kv0", "0.kv1", "1.kv0", "1.kv1"]
    assert np.all(found.values[:32, 2:] > 0)
    assert found.about["kv"] == "kv 0: heads 0-15; kv 1: heads 16-31"
    assert analysis.head_scores(lens, length=5).induction.shape == (2, 32)
