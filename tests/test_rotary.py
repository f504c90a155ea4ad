"""Rotary positions: scores taken apart exactly, and turned otherwise."""

import math

import numpy as np
import pytest
import torch
from conftest import small_lens
from torch.testing import assert_close

import glmlens
from glmlens import analysis, patch, timeline
from glmlens.analysis import rotary
from glmlens.hook_points import HookError
from glmlens.model import apply_rotary, rotary_angles
from glmlens.patch import rotary as surgery
from glmlens.patch.sites import PatchError
from glmlens.rotary_rules import compute_pair_frequencies, stretch_frequencies


def close(found, expected, atol=1e-9):
    assert_close(found, expected, rtol=0, atol=atol * max(1.0, float(expected.abs().max())))


def exact_lens(*args, **changes):
    return small_lens(*args, dtype=torch.float64, **changes)


# ---- scores by part ----


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_parts_of_a_score_sum_to_it(tokens, factor, attention):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}
    lens, eager = (small_lens("glm4", a, rope_parameters=rope) for a in (attention, "eager"))
    _, acts = eager.run_with_cache(tokens[:1], "attn.scores")
    for layer, head in [(0, 0), (2, 3)]:
        found = analysis.score_parts(lens, tokens[:1], layer, head)
        scores, seen = acts["attn.scores", layer][0, head], torch.ones(9, 9).tril().bool()
        parts = torch.as_tensor(found.part.values).sum(-1)
        atol = 1e-5 * float(scores[seen].abs().max())
        assert_close(parts[seen].float(), scores[seen], rtol=0, atol=atol)
        assert torch.isnan(parts[~seen]).all()
        assert found.part.shape[-1] == int(16 * factor) // 2 + (factor < 1)


def test_the_parts_of_a_score_in_bfloat16_sum_to_it_within_rounding(tokens):
    """The model rounds the product to 8 bits, and the scaled score once more."""
    lens = small_lens(dtype=torch.bfloat16)
    _, acts = lens.run_with_cache(tokens[:1], "attn.scores")
    seen = torch.ones(9, 9).tril().bool()
    for layer, head in [(0, 0), (2, 3)]:
        scores = acts["attn.scores", layer][0, head].double()
        parts = torch.as_tensor(analysis.score_parts(lens, tokens[:1], layer, head).part.values).sum(-1).double()
        assert float(((parts - scores)[seen].abs() / parts[seen].abs()).max()) <= 2.001 * 2**-9 + 2**-18


def test_a_part_is_that_of_a_loop_over_two_channels(tokens):
    lens = exact_lens()
    _, acts = lens.run_with_cache(tokens[:1], ["attn.q", "attn.k"])
    found = analysis.score_parts(lens, tokens[:1], 1, 3, query=[5, 8], key=[0, 4])
    q, k = acts["attn.q", 1][0, :, 3], acts["attn.k", 1][0, :, 1]  # heads 2 and 3 read kv head 1
    for i, query in enumerate([5, 8]):
        for j, key in enumerate([0, 4]):
            for pair in range(4):
                w = 10000.0 ** (-2 * pair / 8)
                (a, b), (c, d) = q[query, 2 * pair : 2 * pair + 2].tolist(), k[key, 2 * pair : 2 * pair + 2].tolist()
                turned_q = complex(a, b) * complex(math.cos(query * w), math.sin(query * w))
                turned_k = complex(c, d) * complex(math.cos(key * w), math.sin(key * w))
                expected = (turned_q * turned_k.conjugate()).real / 4
                assert math.isclose(found.part.values[i, j, pair], expected, abs_tol=1e-12)
                wave = found.amplitude.values[i, j, pair] * math.cos(
                    found.phase.values[i, j, pair] + found.angle.values[i, j, pair]
                )
                if key <= query:
                    assert math.isclose(wave, expected, abs_tol=1e-12)
                    assert math.isclose(found.angle.values[i, j, pair], (query - key) * w)
            content = float(q[query, 8:] @ k[key, 8:]) / 4
            assert math.isclose(found.part.values[i, j, 4], content, abs_tol=1e-12)


def test_a_wavelength_is_the_tokens_of_one_full_rotation():
    lens = exact_lens()
    expected = [2 * math.pi * 10000.0 ** (2 * i / 8) for i in range(4)]
    assert_close(rotary.wavelengths(lens), torch.tensor(expected, dtype=torch.float64))


def test_a_pattern_of_some_channels_only_is_that_with_the_others_removed(tokens):
    lens = exact_lens()

    def nothing(x, point):
        return torch.zeros_like(x)

    found = analysis.score_parts(lens, tokens[:1], 1, 2)
    seen = np.tril(np.ones((9, 9), bool))
    for sheet, removed in (("rotary_alone", "attn.k_pass"), ("content_alone", "attn.k_rot"), ("pattern", None)):
        hooks = {f"blocks.1.{removed}": nothing} if removed else {}
        _, acts = lens.run_with_cache(tokens[:1], "blocks.1.attn.pattern", hooks)
        expected = acts["attn.pattern", 1][0, 2].numpy()
        assert np.allclose(found.sheets()[sheet].values[seen], expected[seen], rtol=0, atol=1e-12), sheet


def test_a_pattern_of_position_alone_depends_on_distance_alone(tokens):
    found = analysis.score_parts(exact_lens(), tokens[:1], 1, 2).position_alone.values
    ratio = found[8, 1:9] / found[8, 0:8]
    assert np.allclose(found[7, 1:8] / found[7, 0:7], ratio[1:], atol=1e-12)


def test_the_distance_profile_is_the_score_of_the_mean_query_and_key(tokens):
    lens = exact_lens()
    found = analysis.distance_profile(lens, tokens, distances=30)
    _, acts = lens.run_with_cache(tokens, ["attn.q", "attn.k"])
    w = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    for layer, head, distance in [(0, 0, 0), (1, 3, 7), (2, 2, 29)]:
        q, k = acts["attn.q", layer][:, :, head].mean((0, 1)), acts["attn.k", layer][:, :, head // 2].mean((0, 1))
        score = float(q[8:] @ k[8:])
        for i in range(4):
            turned = complex(*q[2 * i : 2 * i + 2].tolist()) * complex(
                math.cos(distance * w[i]), math.sin(distance * w[i])
            )
            score += (turned * complex(*k[2 * i : 2 * i + 2].tolist()).conjugate()).real
        assert math.isclose(found.score.values[layer, head, distance], score / 4, abs_tol=1e-12)
    wave = found.amplitude.values * np.cos(found.phase.values)
    assert np.allclose(wave.sum(-1) + found.content.values, found.score.values[..., 0], atol=1e-12)
    assert np.allclose(found.attention.values.sum(-1), 1)


def test_lifts_of_pairs_add_up_to_the_score_above_its_mean():
    lens = exact_lens()
    found = analysis.pair_use(lens, rows=2, length=6, seed=3)
    ids = analysis.heads.draw_words(lens, 2, 6, 3, None)
    _, acts = lens.run_with_cache(ids.repeat(1, 2), "attn.scores")
    for name, offset, first in (("previous", 1, 1), ("duplicate", 6, 6), ("induction", 5, 6)):
        expected = torch.zeros(3, 4)
        for layer in range(3):
            for head in range(4):
                above = []
                for row in range(2):
                    for t in range(first, 12):
                        scores = acts["attn.scores", layer][row, head, t, : t + 1]
                        above.append(float(scores[t - offset] - scores.mean()))
                expected[layer, head] = sum(above) / len(above)
        assert np.allclose(found.sheets()[name].values.sum(-1), expected.numpy(), atol=1e-6), name


def test_a_previous_token_head_made_by_hand_uses_its_pair():
    """Constant queries and keys in one pair, the key a step behind: the score is largest one token back."""
    lens = exact_lens()
    attn = lens.model.blocks[0].attn
    for linear in (attn.query, attn.key):
        linear.weight.zero_()
        linear.bias.zero_()
    attn.key.bias.view(2, 16)[0, :2] = torch.tensor([5.0, 0.0])
    attn.query.bias.view(4, 16)[1, :2] = 5 * torch.tensor([math.cos(-1.0), math.sin(-1.0)])  # cos(-1 + distance · 1)
    found = analysis.distance_profile(lens, torch.arange(2, 30)[None], distances=6)
    assert found.attention.values[0, 1].argmax() == 1
    use = analysis.pair_use(lens, rows=2, length=5).previous.values[0, 1]
    assert use[0] > 1
    assert np.allclose(use[1:], 0)


# ---- surgery ----


def logits_with(lens, tokens, hooks):
    return lens.run_with_hooks(tokens, hooks)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_shifting_all_positions_by_a_constant_changes_nothing(tokens, attention):
    lens = exact_lens("glm4", attention)
    for by in (1, 137, -5):
        close(logits_with(lens, tokens, surgery.shift(lens, by)), lens(tokens))
        by_group = surgery.shift(lens, by, layer=1, kv=1)
        close(logits_with(lens, tokens, by_group), lens(tokens))


def test_shifting_queries_alone_does_change_what_is_said(tokens):
    lens = exact_lens()
    for of in ("q", "k"):
        assert float((logits_with(lens, tokens, surgery.shift(lens, 3, of=of)) - lens(tokens)).abs().max()) > 1e-3


def test_silencing_all_pairs_of_a_head_of_content_alone_changes_nothing(tokens):
    lens = exact_lens()
    lens.model.blocks[1].attn.query.weight.view(4, 16, 48)[2, :8] = 0
    lens.model.blocks[1].attn.query.bias.view(4, 16)[2, :8] = 0
    for hooks in (surgery.silence(lens, layer=1, head=2), surgery.silence(lens, layer=1, head=2, of="q")):
        close(logits_with(lens, tokens, hooks), lens(tokens))
    close(logits_with(lens, tokens, surgery.freeze(lens, layer=1, head=2)), lens(tokens))
    other = logits_with(lens, tokens, surgery.silence(lens, layer=1, head=1))
    assert float((other - lens(tokens)).abs().max()) > 1e-3


def test_moving_one_token_equals_building_its_angles_by_hand(any_lens, tokens):
    ids = torch.arange(9).expand(2, 9).clone()
    ids[:, 4] += 3
    cos, sin = rotary_angles(ids, any_lens.cfg, torch.float32)
    by_hand = {f"blocks.{i}.rotary.cos": lambda x, point: cos for i in range(3)}
    by_hand |= {f"blocks.{i}.rotary.sin": lambda x, point: sin for i in range(3)}
    found = logits_with(any_lens, tokens, surgery.shift(any_lens, {4: 3}))
    assert torch.equal(found, logits_with(any_lens, tokens, by_hand))


@pytest.mark.parametrize("place", [{}, {"head": 2}, {"of": "q"}, {"kv": 1}], ids=str)
def test_surgeries_of_several_tokens_or_pairs_add_up(tokens, place):
    lens = exact_lens()
    shifts = [*surgery.shift(lens, {4: 3}, **place), *surgery.shift(lens, {6: 1}, **place)]
    freezes = [*surgery.freeze(lens, pair=0, **place), *surgery.freeze(lens, pair=2, **place)]
    if place != {"head": 2}:  # its scores are made anew: of two tokens moved alone is none with both moved
        close(logits_with(lens, tokens, shifts), logits_with(lens, tokens, surgery.shift(lens, {4: 3, 6: 1}, **place)))
    close(logits_with(lens, tokens, freezes), logits_with(lens, tokens, surgery.freeze(lens, pair=[0, 2], **place)))


@pytest.mark.parametrize("place", [{}, {"head": 2}, {"of": "q"}, {"kv": 1}], ids=str)
def test_a_token_is_moved_where_it_stands_alone_and_one_that_never_comes_is_an_error(tokens, place):
    lens = exact_lens()
    line = timeline.record_timeline(
        lens, tokens[:1], 4, hooks=surgery.shift(lens, {10: 3}, layer=1, **place), stop_ids=()
    )
    whole = torch.cat([tokens[:1], torch.tensor([line.tokens])], 1)[:, :-1]
    close(line.logits, logits_with(lens, whole, surgery.shift(lens, {10: 3}, layer=1, **place))[0, 8:])
    assert {event.step for event in line.events if event.changed} == ({2, 3} if place == {"head": 2} else {2})
    with pytest.raises(HookError, match="position 9"):
        logits_with(lens, tokens, surgery.shift(lens, {9: 3}, **place))


def test_surgery_in_bfloat16_turns_by_angles_rounded_once(tokens):
    """What stays where it is keeps every bit; what moves is as near as two roundings to 8 bits allow."""
    lens, exact = small_lens(dtype=torch.bfloat16), exact_lens()
    assert torch.equal(logits_with(lens, tokens, surgery.shift(lens, 0, layer=1, head=2)), lens(tokens))
    names = ["blocks.0.attn.q", "blocks.0.attn.q_rot"]
    _, plain = lens.run_with_cache(tokens, names)
    _, moved = lens.run_with_cache(tokens, names, surgery.shift(lens, {4: 3}, layer=0, head=2, of="q"))
    assert torch.equal(moved["attn.q_rot", 0][:, :, [0, 1, 3]], plain["attn.q_rot", 0][:, :, [0, 1, 3]])
    rest = [i for i in range(9) if i != 4]
    assert torch.equal(moved["attn.q_rot", 0][:, rest], plain["attn.q_rot", 0][:, rest])
    angle = 7 * compute_pair_frequencies(exact.cfg, torch.float64, exact.device)
    q = plain["attn.q", 0][:, 4:5, 2:3, :8].double()
    expected = apply_rotary(q, angle.cos().expand(2, 1, 4), angle.sin().expand(2, 1, 4))
    error = (moved["attn.q_rot", 0][:, 4:5, 2:3].double() - expected).abs().max() / q.abs().max()
    assert float(error) < 4 * 2**-9


def scores_by_hand(lens, tokens, layer, query_angle, key_angle):
    """The scores of a layer whose query at p and key at p turn by these angles [pos, pair]."""
    _, acts = lens.run_with_cache(tokens, ["attn.q", "attn.k"])
    q, k = acts["attn.q", layer], acts["attn.k", layer].repeat_interleave(2, 2)
    turned = []
    for x, angle in ((q, query_angle), (k, key_angle)):
        z = torch.view_as_complex(x[..., :8].unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones_like(angle), angle
        ).unsqueeze(-2)
        turned.append(torch.cat([torch.view_as_real(z).flatten(-2), x[..., 8:]], -1))
    return torch.einsum("bqhd,bkhd->bhqk", *turned) / 4


@pytest.mark.parametrize("place", [{}, {"head": 2}, {"head": 2, "of": "q"}, {"kv": 1}, {"kv": 1, "of": "k"}])
def test_a_frozen_pair_turns_as_at_one_position_and_only_there(tokens, place):
    lens = exact_lens()
    hooks = surgery.freeze(lens, at=2, layer=0, pair=[0, 3], **place)
    _, acts = lens.run_with_cache(tokens, "attn.scores", hooks)
    published = torch.arange(9, dtype=torch.float64)[:, None] * compute_pair_frequencies(
        lens.cfg, torch.float64, lens.device
    )
    frozen = published.clone()
    frozen[:, [0, 3]] = published[2, [0, 3]]
    of = place.get("of", "both")
    angles = [frozen if of in ("both", side) else published for side in ("q", "k")]
    expected, plain = scores_by_hand(lens, tokens, 0, *angles), scores_by_hand(lens, tokens, 0, published, published)
    heads = [place["head"]] if "head" in place else [2, 3] if "kv" in place else range(4)
    seen = torch.ones(9, 9).tril().bool()
    for head in range(4):
        found = acts["attn.scores", 0][:, head, seen]
        close(found, (expected if head in heads else plain)[:, head, seen], 1e-12)


def test_a_head_without_position_sees_words_in_any_order_alike(tokens):
    """The scores of a frozen head in the first layer do not depend on where its keys stand."""
    lens = exact_lens()
    hooks = surgery.freeze(lens, layer=0, head=1)
    other = tokens[:, [3, 0, 2, 1, 4, 5, 6, 7, 8]]
    scores = [lens.run_with_cache(t, "blocks.0.attn.scores", hooks)[1]["attn.scores", 0] for t in (tokens, other)]
    close(scores[1][:, 1, 8], scores[0][:, 1, 8, [3, 0, 2, 1, 4, 5, 6, 7, 8]])
    assert float((scores[1][:, 0, 8] - scores[0][:, 0, 8, [3, 0, 2, 1, 4, 5, 6, 7, 8]]).abs().max()) > 1e-3


@pytest.mark.parametrize("place", [{}, {"head": 1}, {"kv": 0}, {"of": "k"}, {"head": 3, "of": "q"}])
def test_surgery_in_generation_is_surgery_in_one_pass(tokens, place):
    lens = exact_lens()
    hooks = surgery.stretch(lens, "linear", 4.0, layer=[0, 2], **place)
    run = lens.generate(tokens, 5, hooks=hooks, names="logits", stop_ids=())
    whole = logits_with(lens, run.tokens[:, :-1], hooks)
    close(run.acts["logits"], whole[:, 8:] if run.acts["logits"].shape[1] == 5 else whole)


@pytest.mark.parametrize("kind", ["theta", "linear", "ntk", "yarn"])
def test_a_stretch_by_one_is_no_stretch(tokens, kind):
    lens = exact_lens("glm4", "sdpa")
    close(logits_with(lens, tokens, surgery.stretch(lens, kind, 1)), lens(tokens))


def test_a_linear_stretch_by_two_is_every_other_position(tokens):
    lens = exact_lens()
    hooks = surgery.stretch(lens, "linear", 2.0)
    close(lens.run_with_hooks(tokens, hooks, position_ids=2 * torch.arange(9)), lens(tokens))


def test_a_stretched_base_is_a_model_with_that_base(tokens):
    rope = {"rope_type": "default", "rope_theta": 70000.0, "partial_rotary_factor": 0.5}
    lens, other = exact_lens(), exact_lens(rope_parameters=rope)
    close(logits_with(lens, tokens, surgery.stretch(lens, "theta", 7.0)), other(tokens))


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
def test_stretched_frequencies_are_those_of_transformers_where_it_has_the_same_rule(kind):
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    lens = small_lens(head_dim=64, max_position_embeddings=512)
    theirs = {"linear": "linear", "ntk": "dynamic", "yarn": "yarn"}[kind]
    rope = {"rope_type": theirs, "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "factor": 4.0}
    if kind == "ntk":
        rope["factor"] = 1.0  # "dynamic" stretches by factor · length / context - (factor - 1)
    config = transformers.GlmConfig(head_dim=64, max_position_embeddings=512, rope_parameters=rope)
    if kind == "yarn":
        config.rope_parameters["original_max_position_embeddings"] = 512
    expected = ROPE_INIT_FUNCTIONS[theirs](config, torch.device("cpu"), seq_len=2048)
    plain = compute_pair_frequencies(lens.cfg, torch.float32, lens.device)
    found = stretch_frequencies(lens.cfg, kind, 4.0, plain)
    assert_close(found[0], expected[0].float())
    assert found[1] == expected[1]


def test_yarn_is_the_formula_of_its_paper_but_for_what_lies_between():
    """Published models mix along the number of the pair, the paper along its turns: alike at both ends."""
    lens = small_lens(head_dim=64)
    plain = compute_pair_frequencies(lens.cfg, torch.float64, lens.device)
    found, _ = stretch_frequencies(lens.cfg, "yarn", 8.0, plain, context=200)
    turns = 200 * plain / (2 * math.pi)
    stay, slow = turns > 32, turns < 0.5
    assert_close(found[stay], plain[stay])
    assert_close(found[slow], plain[slow] / 8)
    between = found[~stay & ~slow] / plain[~stay & ~slow]
    assert (between.diff() < 0).all()
    assert ((between <= 1) & (between >= 1 / 8)).all()
    _, acts = lens.run_with_cache(
        torch.arange(1, 10)[None], "rotary.cos", surgery.stretch(lens, "yarn", 8.0, context=200)
    )
    assert_close(acts["rotary.cos", 0][0, 0], torch.full((16,), 0.1 * math.log(8) + 1))


def test_breakage_is_what_two_plain_runs_say(lens, tokens):
    hooks = {"no position": surgery.freeze(lens), "all later": surgery.shift(lens, 5)}
    found = surgery.breakage(lens, tokens, hooks)
    p, q = (logits_with(lens, tokens, h).log_softmax(-1) for h in ([], hooks["no position"]))
    nll = [-x[:, :-1].gather(-1, tokens[:, 1:, None]).mean() for x in (p, q)]
    assert found.loss.at(surgery="no position") == pytest.approx(float(nll[1] - nll[0]), abs=1e-5)
    assert found.kl.at(surgery="no position") == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)
    assert found.agreement.at(surgery="no position") == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1)).float().mean())
    )
    assert found.kl.at(surgery="all later") == pytest.approx(0, abs=1e-6)


def test_the_previous_token_head_of_the_demo_looks_by_position_and_not_by_content():
    lens = glmlens.load(dtype="float32")
    layer, head, _ = analysis.head_scores(lens).best("previous", 1)[0]
    use = analysis.pair_use(lens).previous.values[layer, head]
    assert use[:-1].sum() > 10 * abs(use[-1])
    words = torch.tensor(lens.tokenizer.list_word_ids()[:20])[None]
    hooks = {
        "by position": surgery.freeze(lens, layer=layer, head=head),
        "nothing": surgery.shift(lens, 0, layer=layer),
    }
    found = surgery.breakage(lens, words, hooks).kl
    assert found.at(surgery="by position") > found.at(surgery="nothing") == 0


def test_places_that_are_not_there_are_errors_that_say_what_is(lens, tokens):
    with pytest.raises(PatchError, match="there are 4, 0 to 3"):
        surgery.freeze(lens, pair=4)
    with pytest.raises(PatchError, match="heads share keys"):
        surgery.freeze(lens, head=1, of="k")
    with pytest.raises(PatchError, match="choose from 'both', 'q', 'k'"):
        surgery.freeze(lens, of="v")
    with pytest.raises(ValueError, match="'linear', 'ntk', 'yarn'"):
        surgery.stretch(lens, "longer", 2)
    with pytest.raises(IndexError, match="position 9 asked for"):
        analysis.score_parts(lens, tokens[:1], 0, 0, query=9)
    with pytest.raises(ValueError, match="one prompt at a time"):
        analysis.score_parts(lens, tokens, 0, 0)
    fused = small_lens(attention="sdpa")
    with pytest.raises(HookError, match="attention='eager'"):
        logits_with(fused, tokens, surgery.freeze(fused, head=1))
    assert patch.rotary is surgery
