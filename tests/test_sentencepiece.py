"""Tokenizers as SentencePiece has them: what stands before and behind a text, and the spaces of their tokens."""

import json
import re

import pytest
import torch
from conftest import small_config
from test_text import tokenizer as byte_level
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import glmlens
from glmlens.model import GLM
from glmlens.tasks import TASKS
from glmlens.text.tokenizer import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
KINDS = ["unigram", "metaspace-first", "metaspace-always", "prepend"]
TEXTS = ["Mary went to the store", " Mary went", "", "Mary  and\nJohn", "你好 é", "<s>Mary", "in 1785 (a drink)"]


def sentences():
    yield from 20 * ["a . 0 (x) Mary's mother"]
    for task in ("ioi", "facts", "pronouns"):
        for item, _ in zip(TASKS[task].items(None, 5), range(300), strict=False):
            yield item.text
            yield from item.correct + item.wrong


def sentencepiece(kind, post=("<s>", "$A")):
    """A tokenizer of this kind, trained on sentences of the tasks."""
    if kind == "unigram":
        words = {f"▁{word}": -3.0 for text in sentences() for word in re.findall(r"[A-Za-z]+", text)}
        letters = {letter: -9.0 for text in sentences() for letter in text.replace(" ", "▁")}
        engine = Engine(models.Unigram([*((token, 0.0) for token in SPECIAL), *(words | letters).items()], 0))
        engine.add_special_tokens(SPECIAL)
        engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        engine.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        engine = Engine(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        trainer = trainers.BpeTrainer(vocab_size=1600, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
        spaces = pre_tokenizers.Metaspace(prepend_scheme=kind.removeprefix("metaspace-").replace("prepend", "always"))
        decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        engine.pre_tokenizer, engine.decoder = spaces, decoder
        engine.train_from_iterator(sentences(), trainer)
    if kind == "prepend":  # as Llama 2 and TinyLlama have it
        raw = json.loads(engine.to_str())
        raw["pre_tokenizer"] = None
        engine = Engine.from_str(json.dumps(raw))
        engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw = json.loads(engine.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in SPECIAL]
    engine = Engine.from_str(json.dumps(raw))
    pieces = [(token, engine.token_to_id(token)) for token in post if token != "$A"]
    engine.post_processor = processors.TemplateProcessing(single=list(post), special_tokens=pieces)
    return engine


@pytest.fixture(scope="module")
def engines():
    return {kind: sentencepiece(kind).to_str() for kind in KINDS}


@pytest.fixture(params=KINDS)
def text(request, engines):
    return Tokenizer(Engine.from_str(engines[request.param]))


def lens_of(text):
    torch.manual_seed(0)
    return glmlens.Lens(GLM(small_config(vocab_size=text.engine.get_vocab_size())), text, stop_ids=())


def theirs(engine):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Engine.from_str(engine.to_str()))


POSTS = [("$A",), ("<s>", "$A"), ("<s>", "$A", "</s>"), ("$A", "</s>"), ("<s>", "</s>", "$A")]


@pytest.mark.parametrize("post", POSTS, ids=" ".join)
@pytest.mark.parametrize("kind", ["unigram", "prepend"])
def test_what_stands_around_a_text_is_what_the_checkpoints_tokenizer_puts_there(kind, post, engines):
    engine = Engine.from_str(engines[kind])
    pieces = [(token, engine.token_to_id(token)) for token in post if token != "$A"]
    engine.post_processor = processors.TemplateProcessing(single=list(post), special_tokens=pieces)
    text, reference = Tokenizer(engine), theirs(engine)
    at = post.index("$A")
    assert text.prefix == tuple(engine.token_to_id(t) for t in post[:at])
    assert text.suffix == tuple(engine.token_to_id(t) for t in post[at + 1 :])
    for written in TEXTS:
        if not text.prefix or not written.startswith("<s>"):  # transformers would put a second one
            assert text.encode(written) == reference(written).input_ids
        assert text.encode(written, prefix=False) == reference(written, add_special_tokens=False).input_ids
        assert [*text.encode(written, suffix=False), *text.suffix] == text.encode(written)


@pytest.mark.parametrize("post", [True, False])
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
def test_the_flags_of_a_tokenizer_config_count_as_in_transformers(kind, post, engines, tmp_path):
    from transformers import AutoTokenizer

    raw = json.loads(engines["metaspace-first"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw if post else raw | {"post_processor": None}))
    for flags in ({}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}):
        stated = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **flags}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
        text, reference = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        for written in TEXTS[:4]:
            assert text.encode(written) == reference(written).input_ids


def test_a_vocabulary_that_merely_has_the_prefix_gets_none():
    engine = byte_level()
    engine.post_processor = None
    text = Tokenizer(engine, "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    assert text.engine.token_to_id("[gMASK]") is not None
    assert text.prefix == ()
    lens = lens_of(text)
    assert lens.to_str_tokens("Mary went") == ["Mary", " went"]
    assert lens.to_str_tokens([{"role": "user", "content": "Mary"}]) == ["<|user|>", "Mary"]


def test_before_a_chat_stands_the_prefix_once_whether_its_template_writes_it_or_not(text):
    reference = theirs(text.engine)
    messages = [{"role": "user", "content": "Mary went"}, {"role": "assistant", "content": " to"}]
    for template, added in (
        ("{% for m in messages %}<s>[{{ m.role }}] {{ m.content }}</s>{% endfor %}", []),
        ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}", [*text.prefix]),
    ):
        text.chat_template = reference.chat_template = template
        expected = reference.apply_chat_template(messages, return_dict=False)
        assert lens_of(text).to_tokens(messages)[0].tolist() == added + expected


def test_tokens_keep_their_spaces(text):
    lens = lens_of(text)
    assert text.adds_space
    for written in ("Mary went to the store", "When Mary and John went to the store, John gave a drink to"):
        strings = lens.to_str_tokens(written)
        assert strings[0] == "<s>"
        assert "".join(strings[1:]) == " " + written
        assert "".join(lens.to_labels(written)[1:]) == "·" + written.replace(" ", "·")
        assert lens.to_string(lens.to_tokens(written, prefix=False)) == written
        tokens = lens.to_tokens(written, prefix=False)[0]
        assert lens.to_string(tokens[:2]) + lens.to_string(tokens[2:], continues=True) == written


def test_a_single_token_is_the_one_that_is_written(text):
    lens = lens_of(text)
    i = lens.to_single_token(" Mary")
    assert lens.to_tokens("John gave a drink to Mary")[0, -1] == i
    assert lens.tokenizer.decode_each([i]) == [" Mary"]
    assert lens.to_single_token("a") != lens.to_single_token(" a")
    assert lens.tokenizer.decode_each([lens.to_single_token("a")]) == ["a"]
    assert len(text.list_words()) > 30
    for word in ("Mary", "John", "Paris", "she"):
        assert f" {word}" in text.list_words()
        assert lens.tokenizer.decode_each([lens.to_single_token(f" {word}")]) == [f" {word}"]


@pytest.mark.parametrize("task", ["ioi", "facts", "pronouns"])
def test_tasks_can_be_asked_and_answers_keep_their_space(task, text):
    for example in TASKS[task].examples(text, 20, seed=1):
        assert example.tokens == text.encode(example.item.text)
        for ids, answers in ((example.correct, example.item.correct), (example.wrong, example.item.wrong)):
            assert text.decode_each(ids) == list(answers)
        for name, (start, end) in example.item.prompt.spans.items():
            assert text.decode(example.tokens[1 : example.at(name) + 1])[:end] == example.item.text[:end]
            assert example.item.text[start:end].strip()


def test_a_task_under_a_tokenizer_that_ends_texts_asks_what_comes_next():
    text = Tokenizer(sentencepiece("metaspace-first", ("<s>", "$A", "</s>")))
    for example in TASKS["ioi"].examples(text, 5):
        assert [*example.tokens, *text.suffix] == text.encode(example.item.text)
        assert text.decode_each(example.correct) == list(example.item.correct)


def test_what_is_streamed_is_the_text_and_goes_on_with_the_prompt(text):
    lens = lens_of(text)
    for seed in range(5):
        options = {"temperature": 3.0, "seed": seed}
        run = lens.generate("Mary went", 12, **options)
        assert "".join(step.text for step in lens.stream("Mary went", 12, **options)) == run.text
        spoken = run.tokens[0, 1:].tolist()
        assert "Mary went" + run.text == text.decode(spoken, special=False)
    first = torch.tensor(lens.to_single_token(" Mary"))
    say = {"logits": lambda x, point: torch.full_like(x, -9.0).index_fill(-1, first, 9.0)}
    assert lens.generate("Mary went", 1, hooks=say).text == " Mary"
    assert [step.text for step in lens.stream("Mary went", 2, hooks=say)] == [" Mary", " Mary"]


def test_a_text_after_a_cache_goes_on_as_it_is_written(text):
    lens = lens_of(text)
    whole = lens("Mary went to the store")
    for before, after in (("Mary went", " to the store"), ("Mary went to", " the store")):
        kv = lens.new_kv()
        lens(before, kv=kv)
        torch.testing.assert_close(lens(after, kv=kv)[0, -1], whole[0, -1])
        assert text.decode(kv.tokens[0, 1 : kv.length].tolist()) == "Mary went to the store"
    kv = lens.new_kv()
    lens("Mary went (", kv=kv)
    lens("a drink", kv=kv)
    assert text.decode(kv.tokens[0, 1 : kv.length].tolist()) == "Mary went (a drink"


def test_a_saved_lens_gives_the_same_ids(text, tmp_path):
    from transformers import AutoTokenizer

    lens_of(text).save(tmp_path / "saved")
    again, reference = glmlens.load(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    for written in TEXTS[:5]:
        ids = text.encode(written)
        assert again.to_tokens(written)[0].tolist() == ids == reference(written).input_ids
