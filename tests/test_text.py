"""Text to ids and back."""

import pytest
import torch
from conftest import small_config
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers

import glmlens
from glmlens.model import GLM
from glmlens.tokenizer import Tokenizer

WORDS = ["Mary", "John", "went", "to", "the", "store", ",", "gave", "a", "drink", "and"]


def tokenizer(prefix=True):
    """A byte-level tokenizer of a few words, with GLM's special tokens."""
    special = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"] if prefix else ["<|endoftext|>"]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = [piece for word in WORDS for text in (word, " " + word) for piece, _ in spell.pre_tokenize_str(text)]
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for piece in pieces:
        for i in range(2, len(piece) + 1):
            if piece[:i] not in vocab:
                merges.append((piece[: i - 1], piece[i - 1]))
                vocab[piece[:i]] = len(vocab)
    engine = Engine(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    engine.pre_tokenizer, engine.decoder = spell, decoders.ByteLevel()
    engine.add_special_tokens(special)
    return engine


@pytest.fixture
def lens():
    torch.manual_seed(0)
    engine = tokenizer()
    size = engine.get_vocab_size()
    return glmlens.Lens(
        GLM(small_config(vocab_size=size, pad_token_id=engine.token_to_id("<|endoftext|>"))), Tokenizer(engine)
    )


def test_the_prefix_is_there_exactly_once_whatever_the_route(lens):
    text = "Mary went to the store"
    prefix = [lens.to_single_token("[gMASK]"), lens.to_single_token("<sop>")]
    expected = lens.to_tokens(text)
    assert expected.dtype == torch.long
    assert expected.shape == (1, 7)
    assert expected[0, :2].tolist() == prefix
    assert torch.equal(lens.to_tokens("[gMASK]<sop>" + text), expected)
    assert torch.equal(lens.to_tokens([text])[0], expected[0])
    assert torch.equal(lens.to_tokens(expected), expected)
    assert torch.equal(lens.to_tokens(expected[0].tolist()), expected)
    assert lens.to_tokens("").tolist() == [prefix]
    assert lens.to_tokens(text, prefix=False).tolist() == expected[:, 2:].tolist()
    assert lens.to_str_tokens(text) == ["[gMASK]", "<sop>", "Mary", " went", " to", " the", " store"]
    assert lens.to_str_tokens(text, prefix=False) == ["Mary", " went", " to", " the", " store"]
    assert lens.to_string(expected) == "[gMASK]<sop>" + text


def test_a_post_processor_does_not_add_a_second_prefix():
    from tokenizers.processors import TemplateProcessing

    engine = tokenizer()
    ids = [(t, engine.token_to_id(t)) for t in ("[gMASK]", "<sop>")]
    engine.post_processor = TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=ids)
    assert Tokenizer(engine).encode("Mary") == [ids[0][1], ids[1][1], engine.token_to_id("Mary")]
    assert Tokenizer(engine).encode("Mary", prefix=False) == [engine.token_to_id("Mary")]


def test_a_single_token_has_no_prefix_and_two_are_an_error(lens):
    assert lens.to_single_token(" Mary") == lens.to_tokens("John Mary")[0, -1]
    with pytest.raises(ValueError, match=r"' Mary John' is 2 tokens.*\[' Mary', ' John'\]"):
        lens.to_single_token(" Mary John")
    with pytest.raises(ValueError, match="0 tokens"):
        lens.to_single_token("")


def test_several_texts_are_padded_on_the_left_and_every_route_gives_the_same_answers(lens):
    texts = ["Mary went to the store", "John gave a drink to Mary and John"]
    tokens, mask = lens.to_batch(texts)
    assert mask.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10]
    together = lens(texts)
    assert torch.equal(lens(tokens), together)  # padding ids before a prefix can only be padding
    assert torch.equal(lens(tokens, attention_mask=mask), together)
    for row, text in enumerate(texts):
        alone = lens(text)
        torch.testing.assert_close(together[row, -alone.shape[1] :], alone[0], rtol=0, atol=1e-5)
    assert lens.to_str_tokens(texts) == [lens.to_str_tokens(text) for text in texts]
    run = lens.generate(texts, 4, stop_ids=())
    for row, text in enumerate(texts):
        one = lens.generate(text, 4, stop_ids=())
        assert torch.equal(run.new_tokens[row], one.new_tokens[0])
        assert run.text[row] == one.text
    assert "".join(step.text[0] for step in lens.stream(texts, 4, stop_ids=())) == run.text[0]


def test_a_vocabulary_without_the_prefix_gets_none():
    text = Tokenizer(tokenizer(prefix=False))
    assert text.prefix == ()
    assert text.encode("Mary") == text.encode("Mary", prefix=False)


def test_text_after_a_cache_gets_no_prefix(lens):
    kv = lens.new_kv()
    lens("Mary went to", kv=kv)
    found = lens(" the store", kv=kv)
    torch.testing.assert_close(found, lens("Mary went to the store")[:, -2:], rtol=0, atol=1e-5)


def test_what_is_no_prompt_is_an_error(lens):
    for prompt in (3.5, [], ["a", 3], {"a": 1}):
        with pytest.raises((TypeError, ValueError)):
            lens(prompt)
    with pytest.raises(ValueError, match="whole numbers"):
        lens.to_tokens(torch.zeros(1, 2))
