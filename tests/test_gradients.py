"""Gradients flow through every point."""

import pytest
import torch
from conftest import small_lens

from glmlens.hook_points import HookError


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_finite_differences_agree_at_every_point(model_type, attention, tokens):
    lens = small_lens(model_type, attention, torch.float64)
    weight = torch.randn(2, 9, 101, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for point in lens.points(tokens):
        draw = torch.Generator().manual_seed(4)
        direction = torch.randn(point.shape, dtype=torch.float64, generator=draw)
        if point.local == "attn.scores":
            direction = direction.tril()  # beyond the diagonal the mask is the smallest float: no sum can be read there

        def metric(eps, name=point.name, direction=direction):
            logits = lens.run_with_hooks(tokens, {name: lambda x, point: x + eps * direction})
            return (logits * weight).mean()

        eps = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(metric(eps), eps)
        h = 1e-5
        with torch.no_grad():
            expected = (metric(h) - metric(-h)) / (2 * h)
        assert abs(float(slope - expected)) <= 1e-6 * max(1e-3, abs(float(expected))), point.name


def test_the_gradient_at_a_point_is_had_from_what_a_hook_returns(lens, tokens):
    held = {}

    def hold(x, point):
        held[point.name] = x.requires_grad_()
        return x

    lens.run_with_hooks(tokens, {"blocks.1.resid_pre": hold})[0, -1, 7].backward()
    grad = held["blocks.1.resid_pre"].grad
    assert grad.abs().sum() > 0
    assert (grad[1] == 0).all()


def test_parameters_are_frozen_and_plain_runs_build_no_graph(lens, tokens):
    assert not any(p.requires_grad for p in lens.model.parameters())
    assert not lens(tokens).requires_grad
    lens.W_Q[0].requires_grad_(False)


def test_a_gradient_through_a_cache_is_an_error_not_a_wrong_number(lens, tokens):
    kv = lens.new_kv(batch=2)
    with pytest.raises(ValueError, match="run without kv"):
        lens.run_with_hooks(tokens, {"blocks.0.resid_pre": lambda x, point: x.requires_grad_()}, kv=kv)


@pytest.mark.parametrize(
    ("metric", "shape"),
    [
        (lambda logits: logits[:, -1, :3], r"\(2, 3\)"),
        (lambda logits: logits, r"\(2, 9, 101\)"),
        (lambda logits: logits[0, -1, :3], r"\(3,\)"),
        (lambda logits: logits[:, -1:, 3], r"\(2, 1\)"),
    ],
)
def test_gradients_are_of_one_number_or_one_per_row(lens, tokens, metric, shape):
    with pytest.raises(HookError, match=rf"one number, or one per row \[2\]; it gave {shape}: end it with .sum"):
        lens.run_with_cache(tokens, "resid_post", gradients_of=metric)
    summed = lens.run_with_cache(tokens, "resid_post", gradients_of=lambda logits: metric(logits).sum())[1]
    assert summed.gradients["resid_post"].abs().sum() > 0


def test_gradients_under_no_grad_and_inference_mode_are_the_same(lens, tokens):
    def gradients(tokens, names):
        return lens.run_with_cache(tokens, names, gradients_of=lambda logits: logits[:, -1, 3])[1].gradients

    for names in ("all", "resid_post"):
        expected = gradients(tokens, names)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = gradients(tokens.clone(), names)  # tokens made inside, as a tokenizer makes them
            assert all(torch.equal(found[name], expected[name]) for name in expected)
