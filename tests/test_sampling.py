"""Sampling is transformers' own: same seed, same tokens."""

import pytest
import torch
from conftest import reference, write_checkpoint
from test_text import lens as text_lens  # noqa: F401 - a fixture

import glmlens

WAYS = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.5},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("seed", [2, 3])
def test_the_same_seed_gives_the_tokens_of_transformers(tmp_path, seed, way):
    config = write_checkpoint(tmp_path, seed, initializer_range=0.05)
    theirs, ours = reference(tmp_path), glmlens.load(tmp_path)
    tokens = torch.randint(8, config.vocab_size, (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    mask[1, :3], mask[2, :5] = 0, 0
    tokens = tokens * mask
    sampled = "temperature" in way
    for batch in (tokens[:1], tokens):
        torch.manual_seed(11)
        padding = {"attention_mask": mask[: len(batch)]}
        options = {"top_k": 0} | way if sampled else way
        expected = theirs.generate(batch, max_new_tokens=20, do_sample=sampled, **options, **padding)
        state = torch.random.get_rng_state()
        run = ours.generate(batch, 20, **way, **({"seed": 11} if sampled else {}), **padding)
        assert torch.equal(run.tokens, expected)
        assert torch.equal(torch.random.get_rng_state(), state), "a run draws from a generator of its own"
    if sampled:
        other = ours.generate(tokens, 20, **way, seed=12, attention_mask=mask)
        assert not torch.equal(other.tokens, run.tokens)


@pytest.mark.parametrize("way", WAYS[-2:], ids=str)
def test_what_a_cache_remembers_counts_as_said(tmp_path, way):
    """A generation that goes on from a cache says what it says in one go, with one generator for both."""
    config = write_checkpoint(tmp_path, 2, initializer_range=0.05)
    lens = glmlens.load(tmp_path)
    tokens = torch.randint(8, config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0

    def drawn():
        return {"seed": torch.Generator().manual_seed(3)} if "temperature" in way else {}

    whole = lens.generate(tokens, 12, **way, **drawn(), attention_mask=mask, stop_ids=()).tokens
    draw = drawn()
    first = lens.generate(tokens, 5, **way, **draw, attention_mask=mask, stop_ids=())
    then = lens.generate(first.tokens[:, -1:], 7, kv=first.kv, **way, **draw, stop_ids=())
    assert torch.equal(torch.cat([first.tokens, then.tokens[:, 1:]], 1), whole)
    unknown = lens.new_kv()
    lens(inputs_embeds=torch.randn(1, 3, config.hidden_size), kv=unknown)
    with pytest.raises(ValueError, match="does not know its tokens"):
        lens.generate(tokens[:1], 2, kv=unknown, repetition_penalty=1.5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; expected above 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"top_k": 5}, "pass temperature=1.0"),
        ({"seed": 5}, "pass temperature=1.0"),
    ],
)
def test_a_value_that_makes_no_sense_or_no_difference_is_an_error(lens, tokens, options, told):
    with pytest.raises(ValueError, match=told):
        lens.generate(tokens, 3, **options)


def test_it_stops_at_a_string_and_leaves_it_out_of_the_text(text_lens):  # noqa: F811
    free = text_lens.generate("Mary went", 12, stop_ids=())
    words = text_lens.to_str_tokens(free.new_tokens)
    stop = next(w for w in words[2:] if w.strip() and w not in words[:2] and words.index(w) < 10)
    end = next(i for i in range(len(words)) if stop in "".join(words[: i + 1]))
    run = text_lens.generate("Mary went", 12, stop_ids=(), stop_strings=stop)
    assert run.stopped == "stop"
    assert run.new_tokens.shape[1] == end + 1
    assert stop not in run.text
    assert free.text.startswith(run.text)
