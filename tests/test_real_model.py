"""On a real pretrained model of 135 M parameters."""

import pytest
import torch
from conftest import reference

import glmlens

PROMPTS = [
    "When Mary and John went to the store, John gave a drink to",
    "The capital of France is the city of",
    "Once upon a time, in a small village,",
    "def fibonacci(n):\n    ",
    "The Eiffel Tower → 埃菲尔铁塔. The",
]


@pytest.mark.weights
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_continuations_are_those_of_transformers(real_model, dtype):
    ours = glmlens.load(real_model, dtype=dtype)
    theirs = reference(real_model, dtype=getattr(torch, dtype))
    for prompt in PROMPTS:
        tokens = ours.to_tokens(prompt)
        expected = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=40, do_sample=False)
        assert torch.equal(ours.generate(prompt, 40).tokens, expected)


@pytest.mark.weights
def test_it_knows_who_gets_the_drink(real_model):
    lens = glmlens.load(real_model)
    logits = lens(PROMPTS[0])[0, -1]
    assert int(logits.argmax()) == lens.to_single_token(" Mary")
    assert logits[lens.to_single_token(" Mary")] - logits[lens.to_single_token(" John")] > 3
