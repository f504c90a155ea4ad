"""Going on with a cache: two turns on one cache are the whole conversation run at once, or an error that says why."""

import pytest
import torch
from test_text import tokenizer

import glmlens
from glmlens import cache
from glmlens.text.conversation import CachedRow, continue_chat, read_cached_rows
from glmlens.text.tokenizer import Tokenizer

A, B, C = (
    {"role": "user", "content": f"What is the {asked}?"}
    for asked in ("capital of France", "continent of Greece", "language of Japan")
)
PARIS = {"role": "assistant", "content": "Paris."}


@pytest.fixture(scope="module")
def lens():
    return glmlens.load(dtype="float32")


def entries(kv):
    return kv.tokens[:, : kv.length]


def same_memory(a, b):
    assert torch.equal(entries(a), entries(b))
    n = a.length
    torch.testing.assert_close(a.keys[:, :, :n], b.keys[:, :, :n], rtol=0, atol=1e-4)
    torch.testing.assert_close(a.values[:, :, :n], b.values[:, :, :n], rtol=0, atol=1e-4)


@pytest.mark.parametrize("new", [10, 3, 2])  # ended by a stop token; cut with all said; cut in the middle
def test_two_turns_on_one_cache_are_the_whole_conversation(lens, new):
    first = lens.generate([A], new)
    said = {"role": "assistant", "content": first.text.strip()}
    whole = lens.generate([A, said, B], 10)
    assert whole.text.strip() == "Europe."
    for prompt in ([B], [A, said, B], lens.render([A, said, B])):
        second = lens.generate(prompt, 10, kv=first.kv)
        assert second.text == whole.text
        assert second.tokens[0].tolist() == whole.tokens[0, first.kv.length :].tolist()
        same_memory(second.kv, whole.kv)
        streamed = "".join(step.text for step in lens.stream(prompt, 10, kv=first.kv))
        assert streamed == whole.text
    kv = first.kv.fork()
    logits = lens([B], kv=kv)
    torch.testing.assert_close(logits[0], lens([A, said, B])[0, first.kv.length :], rtol=0, atol=1e-3)
    assert kv.chosen is None
    assert lens.check([A, said, B], kv=first.kv).stored == lens.check([B], kv=first.kv).stored


def test_three_turns_on_one_cache_are_the_whole_conversation(lens):
    one = lens.generate([A], 10)
    two = lens.generate([B], 10, kv=one.kv)
    three = lens.generate([C], 10, kv=two.kv)
    said = [{"role": "assistant", "content": run.text.strip()} for run in (one, two)]
    whole = lens.generate([A, said[0], B, said[1], C], 10)
    assert three.text == whole.text
    same_memory(three.kv, whole.kv)
    with pytest.raises(ValueError, match="or to say the same again, pass all of it with the answers"):
        lens.generate([A], 10, kv=two.kv)  # said again, or the whole chat put in twice? It cannot be known
    again = lens.generate([A, said[0], B, said[1], A], 10, kv=two.kv)
    assert again.text == lens.generate([A, said[0], B, said[1], A], 10).text


def test_several_conversations_go_on_in_one_batch(lens):
    first = lens.generate([[A], [B]], 10)
    said = [[a, {"role": "assistant", "content": text.strip()}] for a, text in zip((A, B), first.text, strict=True)]
    whole = [lens.generate([*said[0], B], 10), lens.generate([*said[1], A], 10)]
    for prompts in ([[B], [A]], [[*said[0], B], [*said[1], A]]):
        second = lens.generate(prompts, 10, kv=first.kv)
        assert second.text == [run.text for run in whole]


def test_a_text_goes_on_after_the_token_that_was_chosen_last(lens):
    first = lens.generate("The capital of France", 2, stop_ids=())
    then = lens.generate(" and the", 3, kv=first.kv, stop_ids=())
    whole = lens.generate("The capital of France" + first.text + " and the", 3, stop_ids=())
    assert then.text == whole.text
    same_memory(then.kv, whole.kv)
    ids = lens.generate(first.tokens[:, -1:], 3, kv=first.kv, stop_ids=())  # ids are run as they are
    assert ids.tokens.shape == (1, 4)


def test_the_token_that_was_chosen_last_is_kept_with_the_cache(lens, tmp_path):
    first = lens.generate([A], 2)
    assert first.kv.chosen.tolist() == first.tokens[:, -1].tolist()
    first.kv.save(tmp_path / "kv")
    again = glmlens.KVCache.load(tmp_path / "kv")
    assert torch.equal(lens.generate([B], 5, kv=again).tokens, lens.generate([B], 5, kv=first.kv).tokens)
    assert lens.generate([A], 10).kv.chosen.tolist() == [-1]  # a stop token is not part of what was said
    kv = first.kv.fork()
    kv.truncate(3)
    assert kv.chosen is None


REFUSED = [
    ([A, {"role": "assistant", "content": "Rome."}, B], r"token 13, after .* is 'Rome' here and 'Paris' in the cache"),
    (
        [{"role": "system", "content": "x"}, A, PARIS, B],
        r"token 2, after .* is '<\|system\|>' here and '<\|user\|>' in",
    ),
    ([A], "holds all 12 tokens of this chat already"),
    ([A, PARIS], "holds all 15 tokens of this chat already"),
]


@pytest.mark.parametrize(("messages", "error"), REFUSED)
def test_a_chat_of_another_beginning_is_refused_and_the_cache_stays(lens, messages, error):
    kv = lens.generate([A], 10).kv
    before = entries(kv).clone()
    for prompt in (messages, lens.render(messages)):
        with pytest.raises(ValueError, match=error.replace("this chat", "this (chat|text.*)")):
            lens.generate(prompt, 5, kv=kv)
        with pytest.raises(ValueError, match="cache"):
            lens(prompt, kv=kv)
    assert torch.equal(entries(kv), before)


def test_a_cache_with_gaps_does_not_know_its_conversation(lens):
    kv = cache.evict(position=5)(lens.generate([A], 10).kv)
    for messages in ([B], [A, PARIS, B]):
        with pytest.raises(ValueError, match="entries of it are dropped, moved or of unknown tokens"):
            lens.generate(messages, 5, kv=kv)
    unknown = lens.new_kv()
    lens(inputs_embeds=torch.randn(1, 3, lens.cfg.d_model), kv=unknown)
    with pytest.raises(ValueError, match="unknown tokens"):
        lens.generate([B], 5, kv=unknown)


def test_what_the_template_would_write_otherwise_is_refused_with_what_to_type(lens):
    kv = lens.new_kv()
    lens(lens.render([A]) + "Paris.", kv=kv)  # without the line that the template begins an answer with
    with pytest.raises(ValueError, match=r"in another way .*'.*assistant\|>Paris.' at its end.*Pass the whole chat"):
        lens.generate([B], 5, kv=kv)


CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPOKEN = {  # what a model of each family says after the cue of its template
    "glm-4-9b-chat": "\nto",
    "GLM-4-0414": "\nto",
    "glm-edge-chat": "to",
    "GLM-4.6": "\n<think></think>\nto",
    "ChatML": "to",
}


@pytest.mark.parametrize("plain", [False, True])  # whether the prefix is left to the tokenizer
@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("name", SPOKEN)
def test_the_next_message_is_what_each_published_template_writes(templates, name, default, plain):
    engine = tokenizer()
    engine.add_special_tokens(["<|system|>", "<|observation|>", "<|im_start|>", "<|im_end|>"])
    text = Tokenizer(engine, CHATML if name == "ChatML" else templates[name])
    here = glmlens.Lens(glmlens.load().model, text)
    if plain:
        text.chat_template = text.chat_template.removeprefix("[gMASK]<sop>")
    asked = [{"role": "system", "content": "the store"}] * (not default) + [{"role": "user", "content": "Mary went"}]
    told = [*asked, {"role": "assistant", "content": "to"}, {"role": "user", "content": "John\ngave"}]
    held = text.encode(here.render(asked) + SPOKEN[name])
    expected = text.encode(here.render(told))
    assert expected[: len(held)] == held
    for cut in (0, 1):
        row = CachedRow(held[: len(held) - cut], held[len(held) - cut :], is_complete=True)
        for messages in (told, told[-1:]):
            found = continue_chat(messages, row, text, here.render)
            assert [*row.tokens, *found] == expected


def test_thoughts_that_a_template_leaves_out_later_are_refused(templates):
    engine = tokenizer()
    engine.add_special_tokens(["<|system|>", "<|observation|>"])
    text = Tokenizer(engine, templates["GLM-4.6"])
    here = glmlens.Lens(glmlens.load().model, text)
    held = text.encode(here.render([{"role": "user", "content": "Mary"}]) + "\n<think>went</think>\nto", prefix=False)
    with pytest.raises(ValueError, match="in another way"):
        continue_chat([{"role": "user", "content": "John"}], CachedRow(held, [], is_complete=True), text, here.render)


def test_an_unmarked_conversation_is_gone_on_with_as_a_whole_chat_alone(lens):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    other = glmlens.Lens(lens.model, Tokenizer(lens.tokenizer.engine, template), stop_ids=lens.stop_ids)
    kv = other.new_kv()
    other([A], kv=kv)
    assert read_cached_rows(kv)[0].is_complete
    with pytest.raises(ValueError, match="Pass the whole chat, with the answers"):
        other([B], kv=kv)
    whole = other([A, PARIS, B])
    found = other([A, PARIS, B], kv=kv)
    torch.testing.assert_close(found[0], whole[0, -found.shape[1] :], rtol=0, atol=1e-3)
