"""The model card: what the model inside can do, and by which parts, measured again."""

import json

import pytest
import torch

import glmlens
from glmlens.demo import card, circuits
from glmlens.lens import BUNDLED_MODEL


@pytest.fixture(scope="module")
def inside():
    return glmlens.load(dtype="float32")


@pytest.fixture(scope="module")
def said():
    return json.loads((BUNDLED_MODEL / "card.json").read_text())


@pytest.mark.parametrize("measure", card.CARD_REQUIREMENTS, ids=lambda m: f"{m.task}, {m.asked}")
def test_it_does_what_the_card_promises(inside, said, measure):
    found = card.measure_task(inside, measure)
    for what, least in measure.minimum.items():
        assert getattr(found, what) >= least, what
    line = next(line for line in said["tasks"] if (line["task"], line["asked"]) == (measure.task, measure.asked))
    assert found.accuracy == pytest.approx(line["accuracy"], abs=0.02)
    assert found.difference == pytest.approx(line["difference"], abs=0.2)


def test_it_does_as_well_on_other_draws_of_the_same_kind(inside):
    for measure in card.CARD_REQUIREMENTS:
        found = card.measure_task(inside, measure, n=100, seed="other")
        for what, least in measure.minimum.items():
            assert getattr(found, what) >= least - 0.05, (measure, what)


def test_in_bfloat16_it_does_as_well(inside):
    half = glmlens.load()
    assert half.dtype == torch.bfloat16
    for measure in card.CARD_REQUIREMENTS:
        found = card.measure_task(half, measure, n=40)
        for what, least in measure.minimum.items():
            assert getattr(found, what) >= least - 0.05, (measure, what)


def test_the_card_is_of_this_model(inside, said):
    assert said["model"] == glmlens.load().model_hash
    page = (BUNDLED_MODEL / "README.md").read_text()
    assert page == card.format_card(said)
    for line in said["tasks"]:
        assert line["asked"] in page


def test_sentiment_is_steered_monotonically_across_zero(inside, said):
    felt = list(card.measure_steering(inside).values())
    assert felt == sorted(felt)
    assert felt[0] < -1 < 1 < felt[-1]
    assert felt == pytest.approx(list(said["steering"].values()), abs=0.1)


def test_the_card_says_which_series_it_cannot_go_on_with(inside, said):
    found = card.measure_untrained_series(inside)
    days = found[0]
    assert days[0] == "Monday, Tuesday, Wednesday,"
    assert (days[1], days[3]) == ("December", "Thursday")  # the README says so too
    page = (BUNDLED_MODEL / "README.md").read_text()
    for (text, word, p, right, rank), line in zip(found, said["from the first word"], strict=True):
        assert [text, word, right, rank] == [*line[:2], *line[3:]]
        assert p == pytest.approx(line[2], abs=0.01)
        assert f"| {text} | {word} |" in page


def test_without_its_induction_heads_it_copies_by_chance(inside, said):
    found = circuits.measure_induction_circuit(inside)
    assert found["accuracy"] >= 0.95
    assert max(found["induction heads"].values()) >= 0.8
    assert max(found["previous-token heads"].values()) >= 0.9
    assert found["without the induction heads"] <= 0.05
    assert found["without as many others of their layers"] >= 0.5
    assert found["without the previous-token heads"] <= 0.3
    assert set(found["induction heads"]) == set(said["induction"]["induction heads"])


def test_a_fact_moves_from_the_subject_to_the_end(inside):
    found = circuits.measure_fact_circuit(inside)
    subject, end = found["restored at the subject"], found["restored at the end"]
    assert subject[0] > 0.6 > 0.4 > end[0]
    assert abs(subject[-1]) < 0.01
    assert end[-1] == pytest.approx(1, abs=0.01)
    assert subject == sorted(subject, reverse=True)
    assert end == sorted(end)


def test_who_receives_is_found_as_the_card_says(inside, said):
    found = circuits.measure_ioi_circuit(inside)
    assert set(found["heads"]) == set(said["ioi"]["heads"])
    assert found["left without these heads"] < 0.05 * found["clean"]
    assert found["left with only these heads"] > 0.7 * found["clean"]

    def looking(look):
        there = {head: part for head, part in found["heads"].items() if part[look] > 0.8}
        least = card.IMPORTANT_SHARE * found["clean"]
        return [head for head, part in there.items() if max(abs(part[name]) for name in card.LOST_COLUMNS) > least]

    for look in ("end to S2", "end to verb", "verb to S2", "end to first name", "end to second name"):
        assert looking(look), look
    giver = looking("end to S2") + looking("end to verb") + looking("verb to S2")
    assert all(found["heads"][head]["lost without"] > 0.2 * found["clean"] for head in giver)
    for order in ("receiver first", "receiver second"):
        assert all(found["heads"][head][order] > 0.2 * found["clean"] for head in giver), order
    for look, sign in (("end to first name", 1), ("end to second name", -1)):  # by where they stand, whoever gives
        for head in looking(look):
            assert sign * found["heads"][head]["receiver first"] > 0.2 * found["clean"], head
            assert sign * found["heads"][head]["receiver second"] < -0.2 * found["clean"], head
    assert abs(found["direct of all heads"]) < 0.1 * found["clean"]
    assert found["mlps"]["3"]["direct"] > 0.8 * found["clean"]
