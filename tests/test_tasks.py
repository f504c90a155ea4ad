"""Tasks: known answers, counterfactuals and named positions, under every tokenizer."""

import itertools
import random
import re

import pytest
import torch
from conftest import SHARED

import glmlens
from glmlens.demo.world import NEVER_OPENS_IOI, SENTENCE_SHARES, is_held_out
from glmlens.tasks import TASKS, Item, Task, TaskError, TextWithSpans, item
from glmlens.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def inside():
    return glmlens.load()


@pytest.fixture(params=["demo", "135M", "GLM-4"])
def tokenizer(request, inside, tmp_path_factory, monkeypatch):
    if request.param == "demo":
        return inside.tokenizer
    if request.param == "135M":
        return Tokenizer.from_folder(request.getfixturevalue("real_model"))
    folder = SHARED / "fixtures" / "glm4-tokenizer"
    if not folder.exists():
        pytest.skip("the recorded data is not here")
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_can_be_asked_under_every_tokenizer(task, tokenizer):
    examples = task.examples(tokenizer, 25, seed=1)
    assert len(examples) == 25
    for example in examples:
        text = example.item.text
        assert example.tokens == tokenizer.encode(text)
        assert len(example.counterfactuals) >= 2
        assert set(example.counterfactuals) <= set(task.counterfactuals)
        for other in example.counterfactuals.values():
            assert len(other) == len(example.tokens)
            assert other != example.tokens
        assert not set(example.correct) & set(example.wrong)
        for ids, answers in ((example.correct, example.item.correct), (example.wrong, example.item.wrong)):
            assert [text + tokenizer.decode([i]) for i in ids] == [text + answer for answer in answers]
        assert example.at("end") == len(example.tokens) - 1
        for name, (start, end) in example.item.prompt.spans.items():
            assert tokenizer.decode(example.tokens[: example.at(name) + 1], special=False)[:end] == text[:end]
            assert text[start:end].strip()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_same_seed_asks_the_same(task, inside):
    first, again, other = (task.examples(inside, 20, seed=seed) for seed in (3, 3, 4))
    assert first.tokens == again.tokens
    assert first.tokens != other.tokens


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_names_its_source_and_what_its_counterfactuals_change(task):
    assert re.search(r"\d{4}", task.source)
    assert len(task.counterfactuals) >= 2
    assert all(task.counterfactuals.values())


def test_ioi_says_who_receives_in_both_orders(inside):
    examples = TASKS["ioi"].examples(inside, 200)
    assert {e.item.slots["order"] for e in examples} == {"ABBA", "BABA"}
    assert len({e.item.slots["opener"] for e in examples}) > 15
    assert len({e.item.slots["verb"] for e in examples}) > 5
    assert len({e.item.slots["join"] for e in examples}) > 5
    for example in examples:
        slots, words = example.item.slots, inside.tokenizer.decode_each(example.tokens)
        assert example.item.correct == (f" {slots['IO']}",)
        assert words[example.at("S2")].strip() == words[example.at("S1")].strip() == slots["S1"]
        assert words[example.at("S1+1")] == words[example.at("S1") + 1]
        assert (example.at("IO") < example.at("S1")) == (slots["order"] == "ABBA")
        flipped = inside.tokenizer.decode_each(example.counterfactuals["flip"])
        assert flipped[example.at("S2")].strip() == slots["IO"]


def test_induction_repeats_what_was_said_and_its_counterfactuals_do_not(inside):
    for example in TASKS["induction"].examples(inside, 50):
        tokens = example.tokens
        assert tokens[example.at("previous")] == tokens[example.at("current")] == tokens[-1]
        assert tokens[example.at("copied")] == example.correct[0]
        assert example.correct[0] not in example.counterfactuals["fresh"]
        assert example.correct[0] not in example.counterfactuals["copied"]


def test_greater_than_splits_the_years_as_the_tokenizer_does(tokenizer):
    for example in TASKS["greater_than"].examples(tokenizer, 30):
        text, start = example.item.text, int(example.item.slots["start"])
        shown = re.search(r"\d+$", text).group()
        for later, answers in ((True, example.item.correct), (False, example.item.wrong)):
            for answer in answers:
                first, last = (int((shown + answer).ljust(4, digit)) for digit in "09")
                assert (first > start) if later else (last <= start)


def test_brackets_close_what_was_opened_last(inside):
    pairs = {"(": ")", "[": "]", "{": "}"}
    for example in TASKS["brackets"].examples(inside, 50):
        open_ = []
        for part in example.item.text.split():
            if part in pairs:
                open_.append(pairs[part])
            elif part in pairs.values():
                assert open_.pop() == part
        assert example.item.correct == (f" {open_[-1]}",)


def test_addition_adds(inside):
    for example in TASKS["addition"].examples(inside, 50):
        a, b = re.search(r"(\d)\+(\d)=$", example.item.text).groups()
        assert int(example.item.correct[0]) == int(a) + int(b)


def bad(text, correct=" Mary", **changes):
    return Task("bad", lambda draw, _: item(text, {"name": "Tom"}, correct, " Paul", **changes), {}, "")


def test_an_answer_of_several_tokens_is_an_error_that_shows_them(inside):
    task = bad("{name} met", " Ulaanbaatarish")
    with pytest.raises(TaskError, match=r"several tokens: ' Ulaanbaatarish' after .* \[' met', ' ', 'U'"):
        task.examples(inside, 1, strict=True)
    with pytest.raises(TaskError, match="an answer of several tokens"):
        task.examples(inside, 1)


def test_counterfactuals_of_another_length_are_an_error_that_shows_both(inside):
    task = bad("The {name} met", longer={"name": "Tom Paul"})
    with pytest.raises(TaskError, match=r"5 and 6 tokens: .*' Tom', ' met'\] and .*' Paul', ' met'\]"):
        task.examples(inside, 1, strict=True)


def test_what_cannot_be_asked_is_dropped_and_counted(inside):
    answers = itertools.cycle([" Mary", " Ulaanbaatarish", " Anna"])
    task = Task("mixed", lambda draw, _: item("{name} met", {"name": "Tom"}, next(answers), " Paul"), {}, "")
    examples = task.examples(inside, 4)
    assert [e.item.correct for e in examples] == [(" Mary",), (" Anna",)] * 2
    assert examples.dropped == {"an answer of several tokens": 2}
    assert "2 dropped: an answer of several tokens" in repr(examples)


def test_a_name_that_is_not_there_is_answered_with_those_that_are(inside):
    examples = TASKS["ioi"].examples(inside, 2)
    with pytest.raises(TaskError, match="no position 'S3' here; there are opener, "):
        examples.at("S3")
    with pytest.raises(TaskError, match="'end\\+1' is position"):
        examples.at("end+1")
    with pytest.raises(TaskError, match="no counterfactual 'flop'; it has flip, abc, names"):
        examples.counterfactual("flop")
    with pytest.raises(TaskError, match="needs a tokenizer"):
        TASKS["ioi"].examples(None)


def nothing(draw, tokenizer):
    return Item(TextWithSpans("", {}), (), (), {}, {})


def test_the_metric_is_what_it_says():
    def example(correct, wrong):
        return glmlens.tasks.Example(nothing(None, None), [0], {}, correct, wrong, {})

    logits = torch.tensor([[[1.0, 5.0, 2.0, 0.0]], [[0.0, 0.0, 3.0, 1.0]]])
    two = (example((1,), (0, 2)), example((0,), (2, 3)))
    difference = glmlens.tasks.Examples(Task("t", nothing, {}, ""), two)
    assert difference.measure(logits).tolist() == [3.0, -3.0]
    assert difference.accuracy(logits) == 0.5
    probability = glmlens.tasks.Examples(Task("t", nothing, {}, "", "probability difference"), two)
    expected = logits[0, 0].softmax(-1)
    assert float(probability.measure(logits)[0]) == pytest.approx(float(expected[1] - expected[0] - expected[2]))


def test_prompts_of_unequal_length_give_the_answers_they_give_alone(inside):
    examples = TASKS["ioi"].examples(inside, 6)
    assert len(set(map(len, examples.tokens))) > 1
    together = examples.measure(inside(examples.tokens))
    alone = torch.cat([examples[i : i + 1].measure(inside(examples.tokens[i : i + 1])) for i in range(6)])
    assert torch.allclose(together, alone, atol=0.1)  # bfloat16: 8 bits of logits near 10
    exact = glmlens.load(dtype="float32")
    together = examples.measure(exact(examples.tokens))
    alone = torch.cat([examples[i : i + 1].measure(exact(examples.tokens[i : i + 1])) for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_the_world_never_says_what_is_held_out():
    draw = random.Random(5)
    for kind in (kind for kind in SENTENCE_SHARES if kind.__name__ in TASKS):
        task = TASKS[kind.__name__]
        drawn = [next(task.items(None, seed)) for seed in range(300)]
        kept = [one for one in drawn if is_held_out(task.name, one)]
        assert 0.1 < len(kept) / len(drawn) < 0.55, task.name
        said = {kind(draw) for _ in range(2000)}
        if task.name in ("successors", "addition"):  # what is held out may begin a longer line, and is never all of one
            assert not said & {one.text + one.correct[0] + "." for one in kept}
        elif task.name != "brackets":  # of which every text begins longer ones: see the card
            begun = [one for one in kept if any(text.startswith(one.text + one.correct[0]) for text in said)]
            assert not begun, task.name
    ioi = next(kind for kind in SENTENCE_SHARES if kind.__name__ == "ioi")
    said = [ioi(draw) for _ in range(500)]
    assert not [text for text in said if text.startswith(tuple(NEVER_OPENS_IOI - {"Before"}))]
