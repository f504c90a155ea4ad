"""Linear probes find a direction that is there, and the control task shows when they memorise."""

import pytest
import torch

import glmlens
from glmlens.analysis import probe


def clouds(n=200, d=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = [("he", "she")[i] for i in torch.randint(2, (n,), generator=draw).tolist()]
    x = torch.randn(n, d, generator=draw)
    x[:, 2] += 6 * torch.tensor([label == "she" for label in labels])
    return x, labels


def test_a_probe_finds_a_direction_that_is_there_and_none_that_is_not():
    x, labels = clouds()
    found = probe(torch.stack([torch.randn_like(x), x]), labels)
    assert found.at(layer=0, part="held out") < 0.7
    assert found.at(layer=1, part="held out") > 0.97
    assert abs(found.at(layer=0, part="selectivity")) < 0.25
    assert found.at(layer=1, part="selectivity") > 0.3
    assert found.at(layer=1, part="chance") < 0.6
    assert float(found.direction(1, "she")[2]) > 0.9
    assert float(found.direction(1, "he")[2]) < -0.9


def test_a_probe_that_memorises_types_is_not_selective():
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(20, (400,), generator=draw)
    x = torch.nn.functional.one_hot(words, 20).float() + 0.1 * torch.randn(400, 20, generator=draw)
    labels = [int(word) % 2 for word in words]
    found = probe(x, labels, types=words.tolist(), l2=0.01)
    assert found.at(layer=0, part="held out") > 0.97
    assert found.at(layer=0, part="control") > 0.97
    assert abs(found.at(layer=0, part="selectivity")) < 0.03


def test_gender_is_decoded_from_the_models_names():
    lens = glmlens.load(dtype="float32")
    examples = glmlens.tasks.pronouns.examples(lens, 120)
    _, acts = lens.run_with_cache(examples, "resid_post", logits=False)
    labels = [example.item.correct[0].strip() for example in examples]
    found = probe(acts.at("end")["resid_post"], labels)
    assert found.shape == (4, 5)
    assert found.at(layer=3, part="held out") > 0.9
    assert found.at(layer=3, part="selectivity") > 0.2


def test_what_cannot_be_probed_is_an_error():
    x, labels = clouds(20)
    with pytest.raises(ValueError, match="19 labels and 19 types for 20"):
        probe(x, labels[1:])
    with pytest.raises(ValueError, match="needs at least two labels"):
        probe(x, ["he"] * 20)
    with pytest.raises(ValueError, match="holds out none"):
        probe(x, labels, held_out=0.0)


@pytest.mark.parametrize("names", [("a | b", "a"), ("he", "she | he"), (0, 1), (None, "None | x")])
def test_a_direction_is_found_whatever_its_label_is_called(names):
    x, labels = clouds()
    named = [names[label == "she"] for label in labels]
    found, plain = probe(x, named), probe(x, labels)
    assert set(found.classes) == set(names)
    assert torch.allclose(found.direction(0, names[1]), plain.direction(0, "she"), atol=1e-4)
    assert torch.allclose(found.direction(0, names[0]), plain.direction(0, "he"), atol=1e-4)
    with pytest.raises(KeyError, match="no label of this probe"):
        found.direction(0, "b")


def test_a_direction_is_of_the_layer_in_its_label():
    x, labels = clouds()
    found = probe(torch.stack([torch.randn_like(x), torch.randn_like(x), x]), labels, layers=(4, 6, 9))
    assert found.labels["layer"] == ["4", "6", "9"]
    assert float(found.direction(9, "she")[2]) > 0.9
    thin = found.stride("layer", 2)
    assert torch.equal(thin.direction(9, "she"), found.direction(9, "she"))
    for missing in (0, 2, 6, -1):
        with pytest.raises(KeyError, match="which has 4, 9"):
            thin.direction(missing, "she")
    with pytest.raises(ValueError, match="2 layers named, and 3 recorded"):
        probe(torch.stack([x, x, x]), labels, layers=(4, 6))
