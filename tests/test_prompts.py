"""What is passed as a prompt: the same answer in every way of writing it, or one error that says what to write."""

import subprocess
import sys

import numpy as np
import prompt_table
import pytest
import torch
from conftest import small_lens
from prompt_table import FUNCTIONS, OTHER, PROMPTS, TEXT, lens_of_words
from torch.testing import assert_close

import glmlens
from glmlens import patch
from glmlens.text.prompt_kinds import check_messages, read_prompt

PAD_FIRST = "<|endoftext|>Mary went to"


@pytest.fixture(scope="module")
def words():
    return lens_of_words()


@pytest.fixture(scope="module")
def bare():
    """A lens whose tokenizer puts nothing before a text; beside longer prompts sums round otherwise, so in float64."""
    return lens_of_words(False, torch.float64)


def close(found, expected):
    if isinstance(expected, torch.Tensor):
        assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
    elif isinstance(expected, tuple) and isinstance(expected[0], torch.Tensor):
        for a, b in zip(found, expected, strict=True):
            close(a, b)
    else:
        assert found == expected


def without_padding(found, expected):
    """The result for a prompt behind two ids of padding, without them."""
    if isinstance(found, torch.Tensor):
        for axis in range(found.ndim):
            if found.shape[axis] == expected.shape[axis] + 2:
                found = found.narrow(axis, 2, expected.shape[axis])
    return found[-len(expected) :] if isinstance(found, list) else found


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_prompt_is_the_same_prompt_in_whatever_way_it_is_written(words, function):
    expected = FUNCTIONS[function](words, TEXT)
    for kind, make in PROMPTS.items():
        if "padded" in kind and function in ("points", "check"):
            continue  # of shapes alone, which padding makes longer
        found = FUNCTIONS[function](words, make(words))
        close(without_padding(found, expected) if "padded" in kind else found, expected)


def test_what_is_no_prompt_is_a_type_error_in_every_function():
    """In a process of its own, where no type checks of the tests stand before the functions."""
    done = subprocess.run([sys.executable, prompt_table.__file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ({"role": "user", "content": "a"}, r"dict.*one message of a chat stands in a list"),
        ({"text": "a"}, r'row\["text"\]'),
        ([{"text": "a"}], r'row\["text"\]'),
        ([{"from": "human", "value": "a"}], r'"role": .*"content": m\["value"\]'),
        ({"a"}, r"set.*no order"),
        (b"a", r"bytes.*decode"),
        (iter(["a"]), r"list_iterator.*pass list"),
        (3, r"got an int"),
        ([None], r"element 0.*NoneType"),
        (["a", 3], r"mixed kinds: element 0 is a text, element 1 is a token id"),
        ([True], r"element 0.*bool"),
        (torch.zeros(1, 2), r"whole numbers.*float32"),
        (torch.tensor(3), r"Tensor"),
        (np.array([0.5]), r"whole numbers.*float64"),
        (np.array(["a"]), r"tolist"),
        (torch.zeros(1, 2, 2, dtype=torch.long), r"shape \(1, 2, 2\)"),
        ([["a"]], r"in a list of prompts each is"),
        ({"input_ids": [[0.5]]}, r"input_ids"),
        ({"input_ids": [[1]], "inputs_embeds": [[1]]}, r"inputs_embeds"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "__next__") else str(value),
)
def test_an_error_names_the_type_and_says_what_to_pass(prompt, told):
    with pytest.raises(TypeError, match=told):
        read_prompt(prompt)


@pytest.mark.parametrize("prompt", [[], [[]], {"input_ids": []}, torch.zeros(1, 0, dtype=torch.long), ""], ids=str)
def test_an_empty_prompt_is_an_error(bare, prompt):
    with pytest.raises((TypeError, ValueError), match=r"empty|no tokens|expected rows"):
        bare(prompt)


def test_an_empty_text_among_others_is_named(bare):
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        bare([TEXT, ""])


def test_a_mask_that_pads_on_the_right_is_refused(words):
    ids = words.to_tokens(TEXT)[0].tolist()
    for mask in ([1] * (len(ids) - 1) + [0], [1, 0] + [1] * (len(ids) - 2)):
        with pytest.raises(ValueError, match="padding_side='left'"):
            words({"input_ids": [ids], "attention_mask": [mask]})
    with pytest.raises(ValueError, match="different shapes"):
        words({"input_ids": [ids], "attention_mask": [[1]]})
    with pytest.raises(ValueError, match="do not count"):
        words({"input_ids": [ids], "attention_mask": [[1] * len(ids)], "position_ids": [list(range(1, len(ids) + 1))]})


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "name": "f", "content": "3"},
        {"role": "observation", "content": "3", "metadata": "f"},
    ],
    ids=str,
)
def test_messages_as_templates_take_them_are_messages(message):
    assert check_messages([message]) == [message]


OTHER_MESSAGES = [{"role": "user"}, {"role": "tool", "content": {"a": 1}}, {"content": "a"}, {"role": 3}]


@pytest.mark.parametrize("message", OTHER_MESSAGES, ids=str)
def test_other_messages_are_refused_before_a_template_makes_them_empty(words, message):
    with pytest.raises(TypeError, match="message 0 of a chat"):
        check_messages([message])
    words.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    try:
        with pytest.raises(TypeError):
            words.render([message])
    finally:
        words.tokenizer.chat_template = None


# ---- padding ----

TEXTS = [TEXT, "Mary went to", OTHER, "John"]


@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no prefix"])
def test_tokens_of_several_texts_are_run_as_each_text_alone(prefix):
    lens = lens_of_words(prefix, torch.float64)
    tokens = lens.to_tokens(TEXTS)
    assert torch.equal(tokens.attention_mask, lens.to_batch(TEXTS)[1])
    together, log_probs = lens(tokens), lens.log_probs(tokens)
    recorded = lens.run_with_cache(tokens, "resid_post")[1]["resid_post"]
    run = lens.generate(tokens, 4, stop_ids=())
    measured = patch.evaluate(lens, tokens, [[prompt_table.ZERO]], (" Mary", " John"), progress=False)
    total = count = 0
    for row, text in enumerate(TEXTS):
        alone, n = lens(text), lens.to_tokens(text).shape[1]
        assert_close(together[row, -n:], alone[0], rtol=0, atol=1e-9)
        acts = lens.run_with_cache(text, "resid_post")[1]
        assert_close(recorded[:, row, -n:], acts["resid_post"][:, 0], rtol=0, atol=1e-9)
        assert torch.equal(run.new_tokens[row], lens.generate(text, 4, stop_ids=()).new_tokens[0])
        expected = patch.evaluate(lens, text, [[prompt_table.ZERO]], (" Mary", " John"), progress=False)
        assert_close(measured[:, row], expected[:, 0], rtol=0, atol=1e-9)
        if n > 1:
            each = lens.log_probs(text)[0]
            assert_close(log_probs[row, log_probs.shape[1] - n + 1 :], each, rtol=0, atol=1e-9)
            total, count = total - float(each.sum()), count + n - 1
    assert float(lens.loss(tokens)) == pytest.approx(total / count, abs=1e-5)


def test_ids_that_could_begin_with_padding_are_refused_where_nothing_says_it(bare):
    tokens, mask = bare.to_batch(TEXTS)
    sliced = bare.to_tokens(TEXTS)[:, :-1]
    for ids in (tokens, tokens.numpy(), tokens.tolist(), tokens[1:2], list(tokens), sliced):
        for run in (bare, bare.loss, bare.log_probs, bare.generate, lambda p: patch.Mean.of_prompts(bare, p)):
            with pytest.raises(ValueError, match="whether they are padding cannot be seen"):
                run(ids)
    together = bare(TEXTS)
    assert torch.equal(bare(tokens, attention_mask=mask), together)
    assert torch.equal(bare({"input_ids": tokens.tolist(), "attention_mask": mask.numpy()}), together)
    with pytest.raises(ValueError, match="takes padding of the prompt for tokens"):
        bare(TEXTS, attention_mask=torch.ones_like(tokens))


def test_padding_before_the_prefix_is_seen_in_slices_lists_and_arrays():
    words = lens_of_words(True, torch.float64)
    tokens = words.to_tokens(TEXTS)
    together = words(TEXTS)
    for ids in (tokens.clone(), tokens.tolist(), tokens.numpy(), list(tokens)):
        assert_close(words(ids), together, rtol=0, atol=1e-9)
    assert_close(words(tokens[1:2])[0, -5:], words(TEXTS[1])[0], rtol=0, atol=1e-9)


def test_a_prefix_that_is_the_padding_id_is_told_from_padding():
    lens = lens_of_words(prefix=False)
    lens.tokenizer.prefix = (lens.pad_id,)
    tokens, mask = lens.to_batch(TEXTS)
    assert int((tokens[1] == lens.pad_id).sum()) == int((mask[1] == 0).sum()) + 1
    assert torch.equal(lens(tokens.clone()), lens(TEXTS))


@pytest.mark.parametrize("function", sorted(set(FUNCTIONS) - {"roles", "analysis.selfcheck"}))
def test_a_text_may_begin_with_the_token_that_pads(bare, function):
    """It is then a token: nothing inside of a function takes it for padding again."""
    if function in ("patch.sweep", "patch.sweep's corrupt", "patch.check", "patch.attribute", "patch.edges",
                    "circuits.path_patch", "patch.Exact", "patch.worlds"):  # fmt: skip
        text = PAD_FIRST + " the store, John gave a drink"  # as long as the other prompt
    else:
        text = PAD_FIRST
    ids = bare.to_batch(text)[0]
    assert int(ids[0, 0]) == bare.pad_id
    expected = FUNCTIONS[function](bare, text)
    found = FUNCTIONS[function](bare, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    close(found, expected)


@pytest.mark.weights
def test_padding_of_a_real_model_without_a_prefix_changes_nothing(real_model):
    lens = glmlens.load(real_model, dtype="float32")
    texts = ["The capital of France is", "When Mary and John went to the store, John gave a drink to"]
    together = lens(lens.to_tokens(texts))
    for row, text in enumerate(texts):
        alone = lens(text)[0]
        assert_close(together[row, -len(alone) :], alone, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="whether they are padding cannot be seen"):
        lens(lens.to_tokens(texts)[:1])


def test_a_residual_stream_of_several_rows_says_what_is_padding(bare):
    tokens, mask = bare.to_batch(TEXTS)
    stream = bare(tokens, stop_layer=1, attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask=torch.ones\(4, "):
        bare(stream, start_layer=1)
    assert torch.equal(bare(stream, start_layer=1, attention_mask=mask), bare(TEXTS))
    single = bare(TEXT, stop_layer=1)
    assert torch.equal(bare(single, start_layer=1), bare(TEXT))


def test_embeddings_that_begin_with_that_of_padding_say_whether_they_are_padded(bare):
    tokens, mask = bare.to_batch(TEXTS)
    embeds = bare.W_E[tokens]
    for given in ({"inputs_embeds": embeds}, {"prompt": embeds}):
        with pytest.raises(ValueError, match="begins with that of the padding id"):
            bare(**given)
        assert torch.equal(bare(**given, attention_mask=mask), bare(TEXTS))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_mask_of_ones_is_no_mask(attention, tokens):
    lens = small_lens("glm", attention)
    assert torch.equal(lens(tokens, attention_mask=torch.ones_like(tokens)), lens(tokens))


# ---- hooks and keywords ----


def test_losses_and_chances_of_an_edited_run(words, capsys):
    hooks = {"blocks.1.attn.z": lambda z, point: 0 * z}
    logits = words.run_with_hooks(TEXT, hooks)
    ids = words.to_tokens(TEXT)
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert_close(words.log_probs(TEXT, hooks=hooks), expected)
    assert_close(words.loss(TEXT, hooks=hooks), -expected.mean())
    assert not torch.allclose(words.loss(TEXT), -expected.mean())
    words.test_prompt(TEXT, " Mary", hooks=hooks)
    chance = float(logits[0, -1].softmax(-1)[words.to_single_token(" Mary")])
    assert f"probability {chance:.2%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "keyword", "told"),
    [
        ("run_with_cache", "names_filter", "names="),
        ("run_with_cache", "pos_slice", "logits_to_keep="),
        ("run_with_cache", "remove_batch_dim", "acts"),
        ("__call__", "return_type", r"lens\.loss"),
        ("__call__", "stop_at_layer", "stop_layer="),
        ("__call__", "prepend_bos", "prefix=False"),
        ("__call__", "hooks", "run_with_hooks"),
        ("run_with_hooks", "fwd_hooks", "hooks="),
        ("run_with_hooks", "bwd_hooks", "gradients_of="),
        ("generate", "stop_at_eos", "stop_ids="),
        ("generate", "temprature", "did you mean temperature="),
        ("stream", "do_sample", "temperature="),
        ("to_tokens", "prepend_bos", "prefix=False"),
        ("to_str_tokens", "prepend_bos", "prefix=False"),
        ("loss", "loss_per_token", "log_probs"),
        ("log_probs", "fwd_hooks", "hooks="),
        ("test_prompt", "prepend_space_to_answer", "the space"),
    ],
)
def test_a_keyword_of_another_library_is_answered_with_ours(words, call, keyword, told):
    given = (TEXT, " Mary") if call == "test_prompt" else (TEXT,)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}': .*{told}"):
        getattr(words, call)(*given, **{keyword: 1})


# ---- more tokens than the context ----


def test_a_run_beyond_the_context_warns_once_for_every_lens():
    lens, tokens = small_lens(max_position_embeddings=8), torch.arange(2, 12)[None]
    lens(tokens[:, :8])
    with pytest.warns(UserWarning, match=r"10 tokens.*context is 8 \(max_position_embeddings\)"):
        lens(tokens)
    lens.run_with_cache(tokens)  # a warning would be an error
    with pytest.warns(UserWarning, match="10 tokens"):
        small_lens(max_position_embeddings=8).check(tokens, "all")


def test_a_generation_warns_at_the_step_that_passes_the_context():
    lens, tokens = small_lens(max_position_embeddings=8), torch.arange(2, 8)[None]
    kv = lens.generate(tokens, 3, stop_ids=()).kv  # its last token is chosen, not run
    assert kv.length == 8
    with pytest.warns(UserWarning, match="9 tokens"):
        lens.generate(tokens, 6, stop_ids=())
    lens = small_lens(max_position_embeddings=8)
    with pytest.warns(UserWarning, match="9 tokens"):
        lens(tokens[:, :1], kv=kv)


def test_padding_does_not_count_as_context():
    lens, tokens = small_lens(max_position_embeddings=8), torch.arange(2, 12)[None]
    mask = torch.ones_like(tokens)
    mask[:, :2] = 0
    lens(tokens, attention_mask=mask)


# ---- many prompts ----


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (TEXT, r"put one prompt in a list"),
        ({"input_ids": [[1, 2]]}, r"put one prompt in a list"),
        (torch.tensor([5, 6]), r"one row of ids"),
        ([5, 6], r"prompt 0: it is a token id"),
        ([{"role": "user", "content": "a"}], r"prompt 0: it is a message"),
        ([{"text": "a"}], r'row\["text"\]'),
        ([TEXT, None], r"prompt 1: .*NoneType"),
        (b"Mary", "bytes"),
    ],
    ids=str,
)
def test_a_harvest_takes_prompts_one_by_one_and_nothing_apart(words, tmp_path, prompts, told):
    with pytest.raises(TypeError, match=told):
        words.harvest(prompts, "resid_post", tmp_path / "out")


def test_a_harvest_of_ids_in_any_form_is_that_of_the_texts(bare, tmp_path):
    expected = bare.harvest(TEXTS, "resid_post", tmp_path / "texts")
    rows = [bare.to_batch(text)[0] for text in TEXTS]
    ways = {
        "lists": [row[0].tolist() for row in rows],
        "tensors": (row[0] for row in rows),
        "arrays": [row[0].numpy() for row in rows],
        "padded": bare.to_tokens(TEXTS),
        "mappings": [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows],
    }
    for name, prompts in ways.items():
        found = bare.harvest(prompts, "resid_post", tmp_path / name)
        assert torch.equal(found.tokens, expected.tokens)
        assert_close(found["resid_post", 2], expected["resid_post", 2], rtol=0, atol=1e-9)
    long = [list(range(2, 100)) * 20 for _ in range(2)]
    long[1][1000] = 1  # printed in short, two long tensors look alike
    roomy = lens_of_words(False, max_position_embeddings=4096)
    roomy.harvest([{"input_ids": torch.tensor(long[0])}], "ln_final.scale", tmp_path / "long")
    with pytest.raises(ValueError, match="made of other prompts"):
        roomy.harvest([{"input_ids": torch.tensor(long[1])}], "ln_final.scale", tmp_path / "long")
