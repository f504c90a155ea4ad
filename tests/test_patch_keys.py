"""Keys: the same for what computes the same, in any process; another for any other function, value or state."""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import small_lens

from glmlens.patch.sweep_checkpoint_keys import UnkeyableError, key_of

WEIGHT = torch.tensor([1.0, 2.0])
FACTOR = 2
ENV = dict(os.environ)


def scaled(logits, by=1.0):
    return logits[:, 0] * by


def uses_scaled(logits):
    return scaled(logits) * FACTOR


def answers(right, wrong):
    return lambda logits: logits[:, right] - logits[:, wrong]


def closes_over(value):
    return lambda logits: (logits, value)


class Difference:
    def __init__(self, right):
        self.right = right

    def __call__(self, logits):
        return logits[:, self.right]

    def other(self, logits):
        return -logits[:, self.right]


@dataclass
class Weighted:
    weight: torch.Tensor

    def __call__(self, logits):
        return logits @ self.weight


DIFFERENT = {
    "another constant": (lambda x: x + 1, lambda x: x + 2),
    "another operation": (lambda x: x + 1, lambda x: x - 1),
    "another name": (lambda x: x.mean(), lambda x: x.sum()),
    "another constant inside": (lambda x: (lambda y: y + 1)(x), lambda x: (lambda y: y + 2)(x)),
    "another closure": (answers(3, 4), answers(3, 5)),
    "another default": (functools.partial(scaled, by=1.0), functools.partial(scaled, by=2.0)),
    "another function in a partial": (functools.partial(scaled), functools.partial(uses_scaled)),
    "another state": (Difference(3), Difference(4)),
    "another method": (Difference(3).__call__, Difference(3).other),
    "another object behind a method": (Difference(3).other, Difference(4).other),
    "another tensor": (closes_over(WEIGHT), closes_over(WEIGHT + 1e-6)),
    "another dtype": (closes_over(WEIGHT), closes_over(WEIGHT.double())),
    "another shape": (closes_over(WEIGHT), closes_over(WEIGHT[None])),
    "another array": (closes_over(np.arange(3)), closes_over(np.arange(1, 4))),
    "another zero": (closes_over(0.0), closes_over(-0.0)),
    "a number and a bool": (closes_over(1), closes_over(True)),
    "another nesting": (closes_over((1, (2, 3))), closes_over(((1, 2), 3))),
    "another mapping": (closes_over({"a": 1}), closes_over({"a": 2})),
    "another field of a dataclass": (Weighted(WEIGHT), Weighted(WEIGHT * 2)),
    "a builtin": (torch.sum, torch.mean),
    "a method of tensors": (torch.Tensor.sum, torch.Tensor.mean),
    "another model": (closes_over(small_lens()), closes_over(small_lens(seed=1))),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_computes_something_else_has_another_key(what):
    one, other = DIFFERENT[what]
    assert key_of(one) == key_of(one)
    assert key_of(one) != key_of(other)


def test_the_same_function_defined_again_has_the_same_key():
    assert key_of(answers(3, 4)) == key_of(answers(3, 4))
    assert key_of(Difference(3)) == key_of(Difference(3))
    assert key_of(Weighted(WEIGHT)) == key_of(Weighted(WEIGHT.clone()))
    assert key_of(closes_over({1, "a", 2.5, "b"})) == key_of(closes_over({"b", 2.5, "a", 1}))
    assert key_of(closes_over(small_lens())) == key_of(closes_over(small_lens()))
    again = key_of(uses_scaled)
    for _ in range(200):  # the interpreter specialises what it runs often
        uses_scaled(torch.ones(1, 2))
    assert key_of(uses_scaled) == again


def test_a_function_is_told_by_the_globals_that_it_reads(monkeypatch):
    before = key_of(uses_scaled)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3)
    assert key_of(uses_scaled) != before
    monkeypatch.undo()
    assert key_of(uses_scaled) == before
    monkeypatch.setattr(sys.modules[__name__], "scaled", lambda logits: logits[:, 1])
    assert key_of(uses_scaled) != before


def test_a_function_is_told_by_what_it_reads_in_a_module_of_the_user(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    keys = []
    for factor in (2, 2, 3):
        (tmp_path / "my_tools.py").write_text(f"def scale(x):\n    return x * {factor}\n")
        monkeypatch.delitem(sys.modules, "my_tools", raising=False)
        namespace = {"my_tools": __import__("my_tools"), "__name__": "__main__"}
        exec("def metric(logits):\n    return my_tools.scale(logits)", namespace)
        keys.append(key_of(namespace["metric"]))
    assert keys[0] == keys[1] != keys[2]


def test_a_class_is_told_by_the_code_of_its_methods():
    def made(sign):
        namespace = {"__name__": "__main__"}
        exec(f"class Metric:\n    def __call__(self, logits):\n        return {sign}logits[:, 0]", namespace)
        return namespace["Metric"]()

    assert key_of(made("")) == key_of(made(""))
    assert key_of(made("")) != key_of(made("-"))


def test_a_cached_function_is_told_by_its_code():
    def made(n):
        namespace = {"functools": functools, "__name__": "__main__"}
        exec(f"@functools.cache\ndef metric(logits):\n    return logits + {n}", namespace)
        return namespace["metric"]

    assert key_of(made(1)) == key_of(made(1))
    assert key_of(made(1)) != key_of(made(2))


def test_functions_that_call_themselves_and_each_other_have_keys():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    assert key_of(even) != key_of(odd)
    loop = [1]
    loop.append(loop)
    assert key_of(loop) == key_of(loop)


def test_what_cannot_be_told_from_another_has_no_key():
    with open(__file__) as file:
        for thing in (file, iter([1]), torch.Generator(), torch.empty(2, device="meta"), (i for i in ())):
            with pytest.raises(UnkeyableError):
                key_of(closes_over(thing))


SCRIPT = """
import torch
from glmlens.patch.sweep_checkpoint_keys import key_of
wrong = {"Anna", "Mary", "John"}
weight = torch.arange(3.0)
class Metric:
    names = frozenset("abcdef")
    def __init__(self): self.weight = weight
    def __call__(self, logits): return (logits @ self.weight).mean() if wrong else torch.softmax(logits, -1)
print(key_of([Metric(), lambda x: x in {"a", "b", "c"}, lambda x: Metric()(x)]))
"""


def test_a_key_is_the_same_in_every_process():
    found = set()
    for seed in ("0", "1", "2"):
        out = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env={**ENV, "PYTHONHASHSEED": seed}
        )
        assert out.returncode == 0, out.stderr
        found.add(out.stdout)
    assert len(found) == 1
