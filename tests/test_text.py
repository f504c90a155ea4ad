"""Text to ids and back."""

import json
import time

import pytest
import torch
from conftest import small_config
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Engine
from tokenizers.processors import TemplateProcessing

import glmlens
from glmlens.model import GLM
from glmlens.text import chat
from glmlens.text.tokenizer import Tokenizer

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
    if prefix:
        ids = [(token, engine.token_to_id(token)) for token in ("[gMASK]", "<sop>")]
        engine.post_processor = TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=ids)
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
    engine = tokenizer()
    ids = [(t, engine.token_to_id(t)) for t in ("[gMASK]", "<sop>")]
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
    free = lens.generate(texts[0], 12, stop_ids=())
    for stop in (None, free.text[3:6], free.text[7:10]):
        streamed = "".join(step.text for step in lens.stream(texts[0], 12, stop_ids=(), stop_strings=stop))
        assert streamed == lens.generate(texts[0], 12, stop_ids=(), stop_strings=stop).text


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
    for prompt in (3.5, ["a", 3], {"a": 1}):
        with pytest.raises(TypeError):
            lens(prompt)
    with pytest.raises(ValueError, match="an empty list"):
        lens([])
    with pytest.raises(TypeError, match="whole numbers"):
        lens.to_tokens(torch.zeros(1, 2))


# GLM-4's own tokenizer and chat templates.


@pytest.fixture(scope="module")
def glm4(tmp_path_factory):
    from conftest import SHARED

    folder = SHARED / "fixtures" / "glm4-tokenizer"
    if not folder.exists():
        pytest.skip("the recorded data is not here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        first = Tokenizer.from_folder(folder)
        again = Tokenizer.from_folder(folder)
    assert first.engine.to_str() == again.engine.to_str()
    return folder, first


def test_a_tokenizer_model_gives_the_known_ids(glm4):
    folder, text = glm4
    golden = json.loads((folder / "golden_tokens.json").read_text())
    assert len(golden["plain"]) == 6
    for case in golden["plain"]:
        assert text.encode(case["text"], prefix=False) == case["ids"]
        assert text.decode(case["ids"]) == case["text"]
    for case in golden["chat"]:
        assert text.encode(case["text"]) == case["ids"]
    assert text.prefix == (151331, 151333)
    assert text.engine.get_vocab_size() == 151343
    assert len(json.loads(text.engine.to_str())["model"]["merges"]) == 318_088
    assert text.encode_single(" Paris") == 12089
    assert text.encode_single(" Mary") == 10239


def test_labels_show_what_cannot_be_seen(glm4):
    _, text = glm4
    ids = [9703, 11, 220, 198, 11157, 248, 222, 151331, 151343, 151551, 109377]
    assert text.labels(ids) == [
        "Hello", ",", "·", "↵", "⟨20 F0 9F⟩", "⟨9A⟩", "⟨80⟩", "[gMASK]", "⟨151343⟩", "⟨151551⟩", "你好",
    ]  # fmt: skip
    assert text.labels([9703, 151331], width=4) == ["Hel…", "[gM…"]
    assert text.label(text.encode_single("\t")) == "→"


MESSAGES = [
    {"role": "system", "content": "SYS"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "U2"},
]
RENDERED = "[gMASK]<sop><|system|>\nSYS<|user|>\nU<|assistant|>\nA<|user|>\nU2<|assistant|>"


def test_chat_messages_render_with_the_checkpoints_own_template(glm4):
    _, text = glm4
    known = chat.render_chat(text.chat_template, MESSAGES, add_generation_prompt=True)
    unknown = chat.render_chat(
        text.chat_template + "{# as another would write it #}", MESSAGES, add_generation_prompt=True
    )
    assert known == unknown == RENDERED
    tool = {"type": "function", "function": {"name": "add", "description": "加", "parameters": {}}}
    said = chat.render_chat(text.chat_template, [{"role": "system", "tools": [tool], "content": ""}])
    assert "# 可用工具\n## add\n" in said
    assert '"description": "加"' in said


def test_the_known_templates_are_the_ones_that_are_known(glm4):
    from hashlib import sha256

    from glmlens.demo.vocabulary import DEMO_CHAT_TEMPLATE

    assert {
        sha256(t.encode()).hexdigest() for t in (DEMO_CHAT_TEMPLATE, glm4[1].chat_template)
    } == chat.TRUSTED_TEMPLATES


def test_the_prefix_is_there_once_through_chat_too(lens):
    lens.tokenizer.chat_template = (
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [{"role": "user", "content": "Mary went to"}]
    expected = ["[gMASK]", "<sop>", "<|user|>", "Mary", " went", " to", "<|assistant|>"]
    assert lens.to_str_tokens(messages) == expected
    assert lens.to_str_tokens(messages, prefix=False) == expected[2:]
    assert torch.equal(lens(messages), lens(lens.render(messages)))
    spoken = [*messages, {"role": "assistant", "content": " the"}]
    assert lens.to_str_tokens(spoken)[-2:] == ["<|assistant|>", " the"]
    batch = lens([messages, spoken])
    torch.testing.assert_close(batch[1], lens(spoken)[0])
    lens.tokenizer.chat_template = lens.tokenizer.chat_template.removeprefix("[gMASK]<sop>")
    assert lens.to_str_tokens(messages) == expected
    lens.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        lens(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 3000000000 }}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{{ messages[0].no.such }}",
    ],
)
def test_a_hostile_template_ends_in_an_error_within_seconds(template):
    begin = time.monotonic()
    with pytest.raises(chat.TemplateError):
        chat.render_chat(template, MESSAGES)
    assert time.monotonic() - begin < 10  # a second for the template, and what a child takes to start on a busy machine


def test_a_file_that_is_no_tokenizer_is_an_error_that_names_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x05sentencepiece\xff")
    with pytest.raises(ValueError, match=r"tokenizer.model: expected lines of 'base64 rank'"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_of_too_many_values_is_not_read(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b'{"model":[' + b"1," * 2_100_000 + b"1]}")
    with pytest.raises(ValueError, match=r"a tokenizer.json of 2,100,000 values; expected at most 2,000,000"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_whose_rules_come_to_no_end_is_an_error():
    engine = tokenizer()
    engine.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+b"), "isolated")
    with pytest.raises(ValueError, match="broke down at 'aaaa"):
        Tokenizer(engine).encode("a" * 40)


def test_prompts_can_be_tested(lens, capsys):
    lens.test_prompt("Mary went to the", " store John")
    said = capsys.readouterr().out
    assert said.count("rank") == 2
    probs = lens("Mary went to the")[0, -1].softmax(-1)
    i = lens.to_single_token(" store")
    assert f"'·store': rank {int((probs > probs[i]).sum())}, probability {float(probs[i]):.2%}" in said


def test_a_text_is_of_one_row_of_ids(lens):
    tokens = lens.to_tokens("Mary went")
    assert lens.to_string([]) == ""
    assert lens.to_string(tokens) == lens.to_string(tokens[0]) == lens.to_string(tokens[0].tolist())
    with pytest.raises(ValueError, match=r"of one row of token ids; got torch.int64 \(2, 4\)"):
        lens.to_string(torch.cat([tokens, tokens]))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        lens.to_string(torch.zeros(2))
    with pytest.raises(ValueError, match="-1 is no token id"):
        lens.to_string([-1, 3])
