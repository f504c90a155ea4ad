"""Worlds side by side, and steering that a cache does not change."""

import pytest
import torch
from conftest import small_lens

from glmlens import patch
from glmlens.patch import PatchError
from glmlens.patch.steering_vectors import logistic_loss

DRAW = torch.Generator().manual_seed(0)
CLEAN, CORRUPT = torch.randint(10, 101, (2, 1, 9), generator=DRAW)
POSITIVE, NEGATIVE = torch.randint(10, 101, (2, 6, 7), generator=DRAW)


def test_worlds_read_each_other_at_the_same_point(any_lens):
    lens = any_lens

    def patched(here, point):
        new = here["patched"].clone()
        new[4:, 1] = here["clean"][4:, 1]
        return {"patched": new}

    found = patch.run_side_by_side(
        lens,
        {"clean": CLEAN, "corrupt": CORRUPT, "patched": CORRUPT, "mixed": CORRUPT},
        [("blocks.1.attn.z", patched),
         ("blocks.*.mlp_out", lambda here, point: {"mixed": (here["clean"] + here["corrupt"]) / 2})],
        names="blocks.2.mlp_out",
    )  # fmt: skip
    clean, corrupt = (lens.run_with_cache(t, "all")[1] for t in (CLEAN, CORRUPT))

    def put(x, point):
        x[:, 4:, 1] = clean[point.name][:, 4:, 1]
        return x

    alone = {
        "clean": lens(CLEAN),
        "corrupt": lens(CORRUPT),
        "patched": lens.run_with_hooks(CORRUPT, {"blocks.1.attn.z": put}),
        "mixed": lens.run_with_hooks(CORRUPT, {"mlp_out": lambda x, p: (clean[p.name] + corrupt[p.name]) / 2}),
    }
    for name, logits in alone.items():
        torch.testing.assert_close(found[name], logits[0], rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert found.acts["blocks.2.mlp_out"].shape[0] == 4


def test_worlds_refuse_what_cannot_be_meant(lens):
    two = {"clean": CLEAN, "corrupt": CORRUPT}
    with pytest.raises(PatchError, match="differ from token"):
        patch.run_side_by_side(lens, {"clean": CLEAN, "corrupt": CORRUPT[:, :5]})
    with pytest.raises(PatchError, match="no run is called 'x'; there are clean, corrupt"):
        patch.run_side_by_side(lens, two, {"embed": lambda here, point: {"x": here["clean"]}})
    with pytest.raises(PatchError, match="changed nothing"):
        patch.run_side_by_side(lens, two, {"embed": lambda here, point: {"clean": here["clean"]}})
    with pytest.raises(PatchError, match=r"expected torch.float32 \(9, 48\)"):
        patch.run_side_by_side(lens, two, {"embed": lambda here, point: {"clean": here["clean"][:3]}})


def activations(lens, tokens):
    return lens.run_with_cache(tokens, "resid_post")[1]["resid_post", 1][:, -1].double()


def test_steering_vectors_are_what_they_are_called(lens):
    plus, minus = activations(lens, POSITIVE), activations(lens, NEGATIVE)
    found = {
        m: patch.fit_steering(lens, POSITIVE, NEGATIVE, method=m, layers=(1, 2)) for m in ("mean", "pca", "logistic")
    }
    difference = plus - minus
    torch.testing.assert_close(found["mean"][1].double(), difference.mean(0), rtol=0, atol=1e-5)
    eigen = torch.linalg.eigh(difference.T @ difference).eigenvectors[:, -1]
    pca = found["pca"][1].double()
    assert abs(float(torch.nn.functional.cosine_similarity(pca, eigen, dim=0))) == pytest.approx(1, abs=1e-6)
    assert float(pca @ difference.mean(0)) == pytest.approx(float(pca @ pca), rel=1e-4)

    both = torch.cat([plus, minus])
    x = (both - both.mean(0)) / both.std(0)
    direction = found["logistic"][1].double() * both.std(0)  # weights of standardised numbers, but for their length
    at = torch.tensor([0.0, 0.0], dtype=torch.float64, requires_grad=True)  # the best length and offset along it
    fit = torch.optim.LBFGS([at], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        fit.zero_grad()
        value = logistic_loss(torch.cat([at[:1] * direction, at[1:]]), x, 6, 0.01)
        value.backward()
        return value

    fit.step(loss)
    whole = torch.cat([at[0].detach() * direction, at[1:].detach()]).requires_grad_()
    (slope,) = torch.autograd.grad(logistic_loss(whole, x, 6, 0.01), whole)
    assert float(slope.abs().max()) < 1e-5  # no weights are better


def test_steering_vectors_add_scale_subtract_and_save(lens, tmp_path):
    v = patch.fit_steering(lens, POSITIVE, NEGATIVE)
    w = patch.fit_steering(lens, NEGATIVE, POSITIVE)
    torch.testing.assert_close((v + w).vectors, torch.zeros_like(v.vectors))
    torch.testing.assert_close((2 * v - v).vectors, v.vectors)
    torch.testing.assert_close(v.normalize().vectors.norm(dim=-1), torch.ones(3))
    v.save(tmp_path / "v.safetensors")
    again = patch.SteeringVector.load(tmp_path / "v.safetensors", lens)
    assert torch.equal(again.vectors, v.vectors)
    assert again.layers == v.layers
    other = small_lens(seed=8)
    with pytest.raises(PatchError, match="for model"):
        patch.SteeringVector.load(tmp_path / "v.safetensors", other)
    with pytest.raises(PatchError, match="not of one model"):
        v + patch.fit_steering(lens, POSITIVE, NEGATIVE, layers=1)
    with pytest.raises(PatchError, match="steer at one with pos model"):
        patch.fit_steering(lens, POSITIVE, NEGATIVE, point="attn.z")


@pytest.mark.parametrize("pos", [None, range(9, 14), (10, 12)])
def test_a_cached_decode_is_steered_as_an_uncached_one(any_lens, pos):
    lens = any_lens
    vector = 6 * patch.fit_steering(lens, POSITIVE, NEGATIVE, layers=(0, 1))
    run = patch.generate_with_interventions(
        lens, CLEAN, 6, vector.interventions(pos=pos), stop_ids=(), names="resid_post"
    )
    tokens = CLEAN
    for _ in range(6):

        def steered(x, point):
            here = [p for p in range(x.shape[1]) if pos is None or p in pos]
            x[:, here] += vector[point.layer]
            return x

        logits = lens.run_with_hooks(tokens, {f"blocks.{i}.resid_post": steered for i in (0, 1)})
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(run.tokens, tokens)
    assert not torch.equal(run.tokens, lens.generate(CLEAN, 6, stop_ids=()).tokens)
