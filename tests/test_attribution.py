"""The parts of a logit, the parts of the residual stream, and the logit lens."""

import subprocess
import sys
from dataclasses import FrozenInstanceError
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import reference, small_lens, write_checkpoint

import glmlens
from glmlens import analysis, tasks
from glmlens.results import Labelled

BY = ["layer", "component", "head", "mlp", "neuron", "source"]
PROMPT = "When Mary and John went to the store, John gave a drink to"


def some_tokens(lens, rows=1, length=11, seed=0):
    return torch.randint(2, lens.cfg.d_vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def largest(result):
    return float(np.nanmax(np.abs(result.parts.values)))


def summed(result):
    return np.nansum(result.parts.values.astype(float), -1)


def sums_to(result, logits):
    """The promise: the sum of the parts is the true logit to 1e-5 of the largest summand."""
    assert np.array_equal(result.total, np.asarray(logits))
    assert np.all(np.abs(summed(result) - result.total) <= 1e-5 * largest(result))
    assert np.allclose(result.unexplained, result.total - summed(result), atol=1e-6 * largest(result))


@pytest.fixture(scope="module")
def demo():
    return glmlens.load(dtype="float32")


@pytest.fixture(scope="module")
def real(real_model):
    return glmlens.load(real_model, dtype="float32")


# ---- the parts of a logit ----


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("seed", range(12))
def test_parts_sum_to_the_logit(tmp_path, seed, by):
    write_checkpoint(tmp_path, seed)  # glm and glm4, rotary on a quarter, half or all of the channels
    lens = glmlens.load(tmp_path, attention="eager" if seed % 4 < 2 else "sdpa")
    tokens = some_tokens(lens, seed=seed)
    for token in (5, 17):
        sums_to(analysis.logit_attribution(lens, tokens, token, by=by), lens(tokens, logits_to_keep=1)[0, -1, token])


@pytest.mark.parametrize("by", BY)
def test_parts_sum_to_the_logit_of_the_model_inside(demo, by):
    answer = demo.to_single_token(" Mary")
    sums_to(analysis.logit_attribution(demo, PROMPT, " Mary", by=by), demo(PROMPT, logits_to_keep=1)[0, -1, answer])


@pytest.mark.weights
@pytest.mark.parametrize("by", BY)
def test_parts_sum_to_the_logit_of_a_real_model(real, by):
    logits = real(PROMPT, logits_to_keep=1)[0, -1]
    mary, john = real.to_single_token(" Mary"), real.to_single_token(" John")
    sums_to(analysis.logit_attribution(real, PROMPT, " Mary", by=by), logits[mary])
    sums_to(analysis.logit_attribution(real, PROMPT, " Mary", " John", by=by), logits[mary] - logits[john])
    best = logits.argmax()
    sums_to(analysis.logit_attribution(real, PROMPT, int(best), by=by), logits[best])


@pytest.mark.parametrize("by", BY)
def test_a_difference_of_tokens_is_the_difference_of_their_parts(lens, tokens, by):
    right, wrong, both = (
        analysis.logit_attribution(lens, tokens[:1], *pair, by=by, position=4) for pair in ((5,), (9,), (5, 9))
    )
    assert np.allclose(both.parts.values, right.parts.values - wrong.parts.values, atol=1e-5 * largest(right))
    assert both.total == pytest.approx(float(right.total - wrong.total), abs=1e-5)
    assert both.about["direction"] == "⟨5⟩ - ⟨9⟩"


def direction_in(lens, acts, token, row, column):
    """Return the direction in the residual stream along which a contribution raises the logit of a token."""
    return lens.W_U[:, token] * lens.model.ln_final.weight * acts["ln_final.scale"][row, column]


def test_parts_are_those_of_a_loop_over_the_model(lens, tokens):
    names = [
        "embed",
        "attn.z",
        "attn.result",
        "attn.pattern",
        "kv.v",
        "mlp.post",
        "ln_final.scale",
        "attn_out",
        "mlp_out",
    ]
    norms = ["ln1_post.scale", "ln2_post.scale"] if lens.cfg.sandwich else []
    _, acts = lens.run_with_cache(tokens, names + norms)
    row, column, token = 0, 6, 31
    pull = direction_in(lens, acts, token, row, column)
    found = {by: analysis.logit_attribution(lens, tokens[:1], token, by=by, position=column) for by in BY}
    for i, block in enumerate(lens.model.blocks):

        def after(name, x, i=i, block=block):
            if not lens.cfg.sandwich:
                return x
            return x * acts[f"{name}.scale", i][row, column] * block.get_submodule(name).weight

        for head in range(lens.cfg.n_heads):
            kv = head // lens.cfg.n_groups
            whole = after("ln1_post", acts["attn.result", i][row, column, head]) @ pull
            assert found["head"].values[i, head] == pytest.approx(float(whole), abs=1e-5)
            for key in range(column + 1):
                said = acts["attn.pattern", i][row, head, column, key] * acts["kv.v", i][row, key, kv]
                part = after("ln1_post", said @ lens.W_O[i, head]) @ pull
                assert found["source"].values[i, head, key] == pytest.approx(float(part), abs=1e-5)
            assert np.all(found["source"].values[i, head, column + 1 :] == 0)
        for neuron in range(0, lens.cfg.d_mlp, 5):
            part = after("ln2_post", acts["mlp.post", i][row, column, neuron] * block.mlp.down.weight[:, neuron]) @ pull
            assert found["neuron"].values[i, neuron] == pytest.approx(float(part), abs=1e-5)
        sublayers = [float(acts[name, i][row, column] @ pull) for name in ("attn_out", "mlp_out")]
        assert found["component"].values[i] == pytest.approx(sublayers, abs=1e-5)
        assert found["layer"].values[i] == pytest.approx(sum(sublayers), abs=1e-5)
        assert found["mlp"].values[i] == pytest.approx(sublayers[1], abs=1e-5)
    for result in found.values():
        assert result.rest.at(part="embed") == pytest.approx(float(acts["embed"][row, column] @ pull), abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_layers_are_those_of_transformers(tmp_path, seed):
    write_checkpoint(tmp_path, seed)
    theirs, ours = reference(tmp_path), glmlens.load(tmp_path)
    tokens, streams = some_tokens(ours), []
    theirs.model.norm.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    with torch.no_grad():
        out = theirs(tokens, output_hidden_states=True)
    stream = [h[0, -1].double() for h in out.hidden_states[:-1]] + [streams[0][0, -1].double()]
    scale = (stream[-1].pow(2).mean() + theirs.config.rms_norm_eps).rsqrt()
    pull = theirs.lm_head.weight[8].detach().double() * theirs.model.norm.weight.detach().double() * scale
    found = analysis.logit_attribution(ours, tokens, 8, by="layer")
    added = [float((b - a) @ pull) for a, b in pairwise(stream)]
    assert found.values == pytest.approx(added, abs=1e-5 * largest(found))
    assert found.total == pytest.approx(float(out.logits[0, -1, 8]), abs=1e-5 * largest(found))


def test_sdpa_has_the_parts_of_eager(tmp_path):
    write_checkpoint(tmp_path, 3)
    eager, sdpa = glmlens.load(tmp_path), glmlens.load(tmp_path, attention="sdpa")
    tokens = some_tokens(eager)
    for by in BY:
        a, b = (analysis.logit_attribution(lens, tokens, 7, by=by, position=5) for lens in (eager, sdpa))
        assert np.allclose(a.parts.values, b.parts.values, atol=1e-5 * largest(a))


@pytest.mark.parametrize("by", BY)
def test_text_chat_lists_and_tensors_give_the_same_answers(demo, by):
    short, chat = "The capital of France is", [{"role": "user", "content": "The capital of France"}]
    for prompt in (short, chat):
        alone = analysis.logit_attribution(demo, prompt, " Paris", by=by)
        tensor = analysis.logit_attribution(demo, demo.to_tokens(prompt), " Paris", by=by)
        assert np.array_equal(alone.parts.values, tensor.parts.values)
        pair = analysis.logit_attribution(
            demo, [demo.to_tokens(p)[0].tolist() for p in (PROMPT, prompt)], " Paris", by=by
        )
        assert pair.axes == ("prompt", *alone.axes)
        assert pair.total[1] == pytest.approx(float(alone.total), abs=1e-5 * largest(pair))
        one = pair.values[1][tuple(map(slice, alone.shape))]
        assert np.allclose(one, alone.values, atol=1e-5 * largest(pair), equal_nan=True)
        if by == "source":  # positions that the shorter prompt has not got are not zeros
            assert np.isnan(pair.values[1, ..., alone.shape[-1] :]).all()
        assert np.all(np.abs(pair.unexplained) <= 1e-5 * largest(pair))


def test_positions_are_absolute_also_with_padding(demo):
    texts = [PROMPT, "The capital of France is the city of"]
    together = analysis.logit_attribution(demo, texts, [" Mary", " Paris"], by="head", position=[5, -2])
    for i, (text, answer, position) in enumerate(zip(texts, [" Mary", " Paris"], [5, -2], strict=True)):
        alone = analysis.logit_attribution(demo, text, answer, by="head", position=position)
        assert np.allclose(together.values[i], alone.values, atol=1e-5 * largest(together))
        length = demo.to_tokens(text).shape[1]
        same = analysis.logit_attribution(demo, text, answer, by="head", position=position % length)
        assert np.array_equal(alone.values, same.values)
    with pytest.raises(IndexError, match=r"position 13 asked for; prompt 1 has \d+ tokens"):
        analysis.logit_attribution(demo, texts, " Mary", position=13)


@pytest.mark.parametrize("task", ["ioi", "facts", "induction"])
def test_examples_are_explained_by_their_own_metric(demo, task):
    examples = tasks.TASKS[task].examples(demo, 6)
    expected = torch.stack([demo(torch.tensor([row]), logits_to_keep=1)[0] for row in examples.tokens])
    found = analysis.logit_attribution(demo, examples, by="head")
    assert found.shape == (demo.cfg.n_layers, demo.cfg.n_heads)
    assert found.total == pytest.approx(float(examples.measure(expected).mean()), abs=1e-4)
    assert abs(summed(found) - found.total) <= 1e-5 * largest(found)


def test_examples_of_several_lengths_have_no_mean_by_source_position(demo):
    examples = tasks.facts.examples(demo, 30)
    assert len(set(map(len, examples.tokens))) > 1
    with pytest.raises(ValueError, match=r"take examples\.of_length"):
        analysis.logit_attribution(demo, examples, by="source")
    alike = examples.of_length()
    found = analysis.logit_attribution(demo, alike, by="source")
    assert found.shape[-1] == len(alike[0].tokens)
    assert abs(summed(found) - found.total) <= 1e-5 * largest(found)


def test_a_position_of_examples_has_a_name(demo):
    examples = tasks.ioi.examples(demo, 4)
    named = analysis.logit_attribution(demo, examples, by="head", position="S2")
    counted = analysis.logit_attribution(demo, examples, by="head", position=examples.at("S2"))
    assert np.array_equal(named.values, counted.values)
    with pytest.raises(TypeError, match="only examples of a task have positions with names"):
        analysis.logit_attribution(demo, PROMPT, " Mary", position="S2")


def test_a_direction_is_read_like_a_token(lens, tokens):
    token = analysis.logit_attribution(lens, tokens[:1], 5, by="head")
    direction = analysis.logit_attribution(lens, tokens[:1], lens.W_U[:, 5], by="head")
    assert np.allclose(token.parts.values, direction.parts.values, atol=1e-6)
    assert direction.total == pytest.approx(float(token.total), abs=1e-5)
    with pytest.raises(TypeError, match="without wrong="):
        analysis.logit_attribution(lens, tokens[:1], lens.W_U[:, 5], 6)


def test_a_head_that_is_ablated_adds_nothing(lens, tokens):
    def ablate(z, point):
        z[:, :, 2] = 0
        return z

    found = analysis.logit_attribution(lens, tokens[:1], 5, by="head", hooks={"blocks.1.attn.z": ablate})
    assert found.values[1, 2] == 0
    assert abs(found.unexplained) <= 1e-5 * largest(found)
    assert (
        found.total == lens.run_with_hooks(tokens[:1], {"blocks.1.attn.z": ablate}, logits_to_keep=1)[0, -1, 5].numpy()
    )


def test_a_change_by_a_hook_between_parts_is_unexplained(lens, tokens):
    def twice(x, point):
        return 2 * x

    found = analysis.logit_attribution(lens, tokens[:1], 5, by="head", hooks={"blocks.1.attn_out": twice})
    assert abs(found.unexplained) > 1e-2 * largest(found)


def test_arguments_that_do_not_fit_are_errors_that_list_the_choices(demo):
    with pytest.raises(ValueError, match="by is 'heads'; choose from 'layer', 'component', 'head'"):
        analysis.logit_attribution(demo, PROMPT, " Mary", by="heads")
    with pytest.raises(TypeError, match="no answer"):
        analysis.logit_attribution(demo, PROMPT)
    with pytest.raises(ValueError, match="tokens, not one"):
        analysis.logit_attribution(demo, PROMPT, " Mary and John")
    with pytest.raises(ValueError, match="2 answers for 1 prompts"):
        analysis.logit_attribution(demo, PROMPT, [" Mary", " John"])
    with pytest.raises(ValueError, match="this model has 0 to"):
        analysis.logit_attribution(demo, PROMPT, demo.cfg.d_vocab)


# ---- the residual stream ----


@pytest.mark.parametrize("by", ["layer", "component", "head"])
def test_the_stream_is_the_sum_of_its_contributions(any_lens, tokens, by):
    parts = analysis.decompose_residual(any_lens, tokens, by=by)
    stream = analysis.accumulated_residual(any_lens, tokens)
    _, acts = any_lens.run_with_cache(tokens, ["embed", "resid_post"])
    assert parts.axes == ("prompt", "part", "pos", "model")
    assert np.array_equal(stream.values[:, 0], acts["embed"].numpy())
    assert np.array_equal(stream.values[:, 1:], acts["resid_post"].transpose(0, 1).numpy())
    gap = np.abs(parts.values.sum(1) - stream.values[:, -1]).max()
    assert gap <= 1e-5 * np.abs(parts.values).max()


def test_parts_of_the_stream_can_be_had_at_one_position():
    demo = glmlens.load(dtype="float64")  # beside longer prompts, sums round otherwise
    texts = [PROMPT, "The capital of France is"]
    both = analysis.decompose_residual(demo, texts, by="head", position=-1)
    for i, text in enumerate(texts):
        whole = analysis.decompose_residual(demo, text, by="head")
        assert np.allclose(both.values[i], whole.values[:, -1], atol=1e-9)
    assert both.labels["part"][:3] == ["embed", "0.0", "0.1"]
    with pytest.raises(ValueError, match="choose from 'layer', 'component', 'head'"):
        analysis.decompose_residual(demo, PROMPT, by="neuron")


def test_the_stream_before_each_mlp_is_returned_with_mid(lens, tokens):
    stream = analysis.accumulated_residual(lens, tokens[:1], mid=True)
    assert stream.labels["layer"] == ["embed", "0 mid", "0", "1 mid", "1", "2 mid", "2"]
    _, acts = lens.run_with_cache(tokens[:1], "resid_mid")
    assert np.array_equal(stream.at(layer="1 mid").values, acts["resid_mid", 1][0].numpy())


# ---- the logit lens ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_the_last_row_is_the_model_s_own_output(model_type, dtype):
    lens = small_lens(model_type, dtype=dtype)
    tokens = some_tokens(lens, length=80)  # more than are unembedded at a time
    found, probs = analysis.logit_lens(lens, tokens, top=3, target=7), lens(tokens)[0].float().log_softmax(-1).exp()
    best = probs.topk(3)
    assert np.array_equal(found.token.values[-1], best.indices.numpy())
    assert np.array_equal(found.probability.values[-1], best.values.numpy())
    assert np.array_equal(found.target_probability.values[-1], probs[:, 7].numpy())
    assert np.all(found.kl.values[-1] == 0)


def test_every_layer_is_read_through_the_real_final_norm(lens, tokens):
    found = analysis.logit_lens(lens, tokens[:1], top=4, target=7, mid=True)
    _, acts = lens.run_with_cache(tokens[:1], ["embed", "resid_mid", "resid_post"])
    last = lens(tokens[:1])[0].double().log_softmax(-1)
    streams = [acts["embed"]]
    for i in range(lens.cfg.n_layers):
        streams += [acts["resid_mid", i], acts["resid_post", i]]
    for i, stream in enumerate(streams):
        x = stream[0].double()
        x = x / (x.pow(2).mean(-1, keepdim=True) + lens.cfg.rms_eps).sqrt() * lens.model.ln_final.weight.double()
        logits = torch.einsum("pm,mv->pv", x, lens.W_U.double())
        own = logits.log_softmax(-1)
        kl = torch.nn.functional.kl_div(own, last, log_target=True, reduction="none").sum(-1)
        assert np.array_equal(found.token.values[i], logits.topk(4).indices.numpy())
        assert np.allclose(found.probability.values[i], own.topk(4).values.exp().numpy(), atol=1e-6)
        assert np.allclose(found.kl.values[i], kl.numpy(), atol=1e-5)
        assert np.array_equal(found.target_rank.values[i], (logits > logits[:, 7:8]).sum(-1).numpy())
        assert np.allclose(found.target_probability.values[i], own[:, 7].exp().numpy(), atol=1e-6)


def test_padded_prompts_are_read_as_they_are_alone(demo):
    texts = [PROMPT, "The capital of France is"]
    both = analysis.logit_lens(demo, texts, target=[" Mary", " Paris"])
    for i, (text, target) in enumerate(zip(texts, [" Mary", " Paris"], strict=True)):
        alone = analysis.logit_lens(demo, text, target=target)
        n = alone.kl.shape[1]
        assert both.kl.axes == ("prompt", "layer", "pos")
        assert np.array_equal(both.token.values[i, :, :n], alone.token.values)
        assert np.array_equal(both.word.values[i, :, :n], alone.word.values)
        assert np.array_equal(both.target_rank.values[i, :, :n], alone.target_rank.values)
        assert np.allclose(both.kl.values[i, :, :n], alone.kl.values, atol=1e-4)
        assert np.isnan(both.kl.values[i, :, n:]).all()
        assert np.all(both.token.values[i, :, n:] == -1)
        assert np.all(both.word.values[i, :, n:] == "")


def test_the_logit_lens_is_of_the_run_with_hooks(demo):
    def gone(x, point):
        return 0 * x

    plain, ablated = (analysis.logit_lens(demo, PROMPT, hooks=h) for h in (None, {"blocks.1.mlp_out": gone}))
    assert np.array_equal(plain.kl.values[-1], ablated.kl.values[-1])
    assert np.array_equal(plain.probability.values[1], ablated.probability.values[1])
    assert not np.array_equal(plain.probability.values[2], ablated.probability.values[2])


# ---- results ----


def results_of(lens):
    yield analysis.logit_attribution(lens, PROMPT, " Mary", " John", by="source")
    yield analysis.decompose_residual(lens, PROMPT)
    yield analysis.accumulated_residual(lens, PROMPT)
    yield from analysis.logit_lens(lens, PROMPT, target=" Mary").sheets().values()
    yield from analysis.head_scores(lens).sheets().values()
    yield analysis.composition(lens, "V")


def test_every_result_describes_itself(demo):
    for result in results_of(demo):
        assert isinstance(result, Labelled)
        assert {"metric", "direction", "positions", "model"} <= result.about.keys()
        assert result.about["model"] == demo.model_hash
        with pytest.raises(FrozenInstanceError):
            result.values = None


def test_results_can_be_thinned_clipped_and_tabled(demo):
    found = analysis.logit_attribution(demo, PROMPT, " Mary", by="source")
    assert found.stride("key", 4).shape == (4, 8, 4)
    assert found.clip(-0.1, 0.1).values.max() <= np.float32(0.1)
    pandas = pytest.importorskip("pandas")
    frame = found.to_dataframe()
    assert list(frame.columns) == ["layer", "head", "key", "value"]
    assert frame.value.sum() == pytest.approx(found.values.sum(), rel=1e-4)
    read = analysis.logit_lens(demo, PROMPT, target=" Mary").stride("layer", 2).clip(0.0, 5.0)
    frame = read.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert set(frame.columns) == {"layer", "pos", "rank"} | set(read.sheets())
    assert len(frame) == 3 * 16 * 5
    assert frame.kl.max() <= 5
    assert list(frame[(frame.layer == "3") & (frame["rank"] == "0")].word)[-1] == read.word.values[-1, -1, 0]
    with pytest.raises(KeyError, match="no axis 'head'"):
        read.stride("head", 2)


def test_positions_with_the_same_token_have_different_labels(demo):
    labels = analysis.logit_lens(demo, PROMPT).kl.labels["pos"]
    assert len(set(labels)) == len(labels)
    assert labels[3] == "3 ·Mary"


def test_analysis_imports_no_plotting():
    code = (
        "import sys, glmlens; glmlens.analysis.logit_lens; print([m for m in ('plotly', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
