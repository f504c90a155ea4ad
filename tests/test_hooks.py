"""The rules that make hooks safe, each with its test."""

import functools

import pytest
import torch
from conftest import small_lens
from torch.testing import assert_close

import glmlens
from glmlens.hook_points import EAGER_ONLY, POINTS, ROOT_POINTS, HookError, axes_of, local_name
from glmlens.hooks import list_edits, only


def every_point(lens):
    return [point.name for point in lens.points()]


# 1. Looking must not change the answer.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_looking_changes_nothing(model_type, attention, dtype, tokens):
    lens = small_lens(model_type, attention, dtype)
    quiet = lens(tokens)
    watched, acts = lens.run_with_cache(tokens, every_point(lens))
    assert torch.equal(watched, quiet)
    assert list(acts) == every_point(lens)
    assert torch.equal(acts["logits"], quiet)
    returned = lens.run_with_hooks(tokens, {name: lambda x, point: x for name in every_point(lens)})
    assert torch.equal(returned, quiet)


def test_looking_at_a_generation_changes_nothing(any_lens, tokens):
    quiet = any_lens.generate(tokens, 8, stop_ids=())
    watched = any_lens.generate(tokens, 8, stop_ids=(), names=every_point(any_lens))
    assert torch.equal(quiet.tokens, watched.tokens)
    assert torch.equal(quiet.kv.keys, watched.kv.keys)
    assert torch.equal(quiet.kv.values, watched.kv.values)


# 2. Asking for what never happens is an error.


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("blocks.0.attn.patern", "blocks.0.attn.pattern"),
        ("blocks.*.attn.nothing", "no point matches"),
        ("block.0.resid_post", "blocks.0.resid_post"),
        ("blocks.7.resid_post", "the layers are 0 to 2"),
        ("resid_pots", "resid_post"),
        ("blocks.3.attn.hook_pattern", "here it is called 'blocks.3.attn.pattern'"),
        ("blocks.0.hook_resid_pre", "here it is called 'blocks.0.resid_pre'"),
        ("hook_embed", "here it is called 'embed'"),
        ("blocks.0.mlp.hook_pre_linear", "here it is called 'blocks.0.mlp.up'"),
        ("blocks.1.attn.hook_rot_k", "here it is called 'blocks.1.attn.k_rot'"),
        ("ln_final.hook_scale", "here it is called 'ln_final.scale'"),
        ("blocks.0.ln1_post.scale", "this model, or the part of it that is run, has no 'ln1_post.scale'"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error_with_the_nearest(tokens, asked, told):
    lens = small_lens("glm")
    for run in (
        lambda: lens.run_with_cache(tokens, asked),
        lambda: lens.run_with_cache(tokens, ["resid_post", asked]),
        lambda: lens.run_with_hooks(tokens, {asked: lambda x, point: x}),
        lambda: lens.check(tokens, names=asked),
        lambda: lens.generate(tokens, 2, names=asked),
        lambda: lens.generate(tokens, 2, hooks=[(asked, lambda x, point: x)]),
    ):
        with pytest.raises(glmlens.HookError) as error:
            run()
        assert told in str(error.value)


@pytest.mark.parametrize("name", EAGER_ONLY)
def test_a_point_that_this_attention_path_has_not_got_is_an_error(tokens, name):
    lens = small_lens(attention="sdpa")
    with pytest.raises(glmlens.HookError, match="attention='eager'"):
        lens.run_with_cache(tokens, f"blocks.0.{name}")
    with pytest.raises(glmlens.HookError, match="attention='eager'"):
        lens.run_with_cache(tokens, name)


def test_every_name_of_transformerlens_leads_to_a_point_that_exists(tokens):
    from glmlens.hook_points import TRANSFORMERLENS_NAMES

    lens = small_lens()
    for theirs, ours in TRANSFORMERLENS_NAMES.items():
        scope = "blocks.0." if ours not in ROOT_POINTS and not ours.startswith("blocks.") else ""
        with pytest.raises(glmlens.HookError) as error:
            lens.run_with_cache(tokens, scope + theirs)
        told = str(error.value).split("here it is called ")[1].strip("'")
        assert len(lens.run_with_cache(tokens, told)[1]) >= 1


def test_a_step_or_position_that_never_comes_is_an_error(tokens):
    lens = small_lens()

    def edit(x, point):
        return x

    o = glmlens.only(edit, positions=3)
    with pytest.raises(glmlens.HookError, match="'logits'"):
        lens.generate(tokens, 3, hooks={"blocks.0.attn.z": o, "logits": o})
    with pytest.raises(glmlens.HookError, match="only"):
        glmlens.only(o, steps=1)
    with pytest.raises(glmlens.HookError, match="never came"):
        lens.check(tokens, hooks={"resid_post": glmlens.only(edit, positions=500)})
    for chosen, told in (
        ({"steps": 5}, "last step of this run is 2"),
        ({"positions": 40}, "last position of this run is 10"),
    ):
        with pytest.raises(glmlens.HookError, match=told):
            lens.generate(tokens, 3, hooks={"resid_post": glmlens.only(edit, **chosen)})
    with pytest.raises(glmlens.HookError, match="never came"):
        lens.run_with_hooks(tokens, {"blocks.0.resid_post": glmlens.only(edit, positions=9)})
    with pytest.raises(glmlens.HookError, match="never came"):
        lens.run_with_hooks(tokens, {"blocks.0.resid_post": glmlens.only(edit, steps=1)})
    with pytest.raises(glmlens.HookError, match="came out empty"):
        glmlens.only(edit, positions=[])
    with pytest.raises(glmlens.HookError, match="came out empty"):
        glmlens.only(edit, steps=range(3, 3))


def test_a_step_that_a_stop_token_prevented_is_an_error_that_keeps_the_run(tokens):
    lens = small_lens()
    first = int(lens.generate(tokens[:1], 1).tokens[0, -1])
    with pytest.raises(glmlens.HookError, match="never came") as error:
        lens.generate(
            tokens[:1],
            5,
            stop_ids=[first],
            names="resid_post",
            hooks={"resid_post": glmlens.only(lambda x, point: x, steps=3)},
        )
    assert error.value.run.tokens[0, -1] == first
    assert error.value.run.acts["resid_post"].shape[2] == 9


def test_points_outside_a_partial_run_are_an_error(tokens):
    lens = small_lens()
    with pytest.raises(glmlens.HookError):
        lens.run_with_cache(tokens, "blocks.2.resid_post", stop_layer=2)
    with pytest.raises(glmlens.HookError):
        lens.run_with_cache(lens(tokens, stop_layer=1), "embed", start_layer=1, attention_mask=torch.ones(2, 9))
    with pytest.raises(glmlens.HookError):
        lens.run_with_cache(tokens, "logits", stop_layer=1)


# 3. What a hook returns is checked at the hook.


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (lambda x: None, "return x"),
        (lambda x: x[:, :1], r"\(2, 1, 4, 16\).*expected \(2, 9, 4, 16\)"),
        (lambda x: x.mean(), "nothing is broadcast"),
        (lambda x: x.double(), "expected torch.float32"),
        (lambda x: x.to("meta"), "expected cpu"),
        (lambda x: 0.0, "expected a tensor"),
    ],
)
def test_a_result_that_cannot_stand_in_is_an_error_at_the_hook(tokens, bad, told):
    lens = small_lens()

    def edit(x, point):
        return bad(x)

    for run in (
        lambda: lens.run_with_hooks(tokens, {"blocks.1.attn.z": glmlens.only(edit, positions=range(9))}),
        lambda: lens.run_with_hooks(tokens, {"blocks.1.attn.z": edit}),
        lambda: lens.generate(tokens, 2, hooks={"blocks.1.attn.z": edit}),
    ):
        with pytest.raises(glmlens.HookError, match=told) as error:
            run()
        assert "blocks.1.attn.z" in str(error.value)
        assert "edit" in str(error.value)


def test_what_a_hook_raises_comes_through_and_leaves_nothing_behind(lens, tokens):
    quiet, kv = lens(tokens), lens.new_kv(batch=2)
    lens(tokens[:, :4], kv=kv)

    def broken(x, point):
        raise ZeroDivisionError("mine")

    for name in ("blocks.1.mlp.post", "ln_final.scale", "logits"):
        with pytest.raises(ZeroDivisionError, match="mine"):
            lens.run_with_hooks(tokens[:, 4:], {name: broken}, kv=kv)
        assert kv.length == 4
    with pytest.raises(glmlens.HookError, match="never came"):
        lens.run_with_hooks(tokens[:, 4:], {"resid_post": glmlens.only(broken, positions=77)}, kv=kv)
    assert kv.length == 4
    assert_close(lens(tokens[:, 4:], kv=kv), quiet[:, 4:], rtol=0, atol=1e-5 * float(quiet.abs().max()))
    assert torch.equal(lens(tokens), quiet)


# 4. An edit in place corrupts no recording, and a recording never aliases memory that the model writes later.


def test_an_edit_in_place_reaches_only_its_own_point(lens, tokens):
    def in_place(x, point):
        return x.mul_(0)

    _, before = lens.run_with_cache(tokens)
    _, after = lens.run_with_cache(tokens, hooks={"blocks.1.resid_pre": in_place})
    assert torch.equal(after["blocks.0.resid_post"], before["blocks.0.resid_post"])
    assert torch.equal(after["blocks.1.resid_pre"], torch.zeros_like(after["blocks.1.resid_pre"]))

    def in_place_and_forgotten(x, point):
        old = x.clone()
        x.fill_(7)
        return old

    same, _ = lens.run_with_cache(tokens, hooks={"*": in_place_and_forgotten})
    assert torch.equal(same, lens(tokens))


def test_recordings_share_no_memory_with_the_cache(any_lens, tokens):
    kv = any_lens.new_kv(batch=2)
    _, acts = any_lens.run_with_cache(tokens, kv=kv)
    kept = {name: x.clone() for name, x in acts.items()}
    kv.keys.fill_(5)
    kv.values.fill_(5)
    run = any_lens.generate(tokens, 4, names="all", stop_ids=())
    run.kv.keys.fill_(5)
    run.kv.values.fill_(5)
    assert all(torch.equal(acts[name], kept[name]) for name in acts)
    assert not any((x == 5).all() for step in run.acts["kv.k", 1] for x in [step])


def test_a_recording_is_of_its_moment_whatever_the_hook_does_with_its_memory(lens, tokens):
    buffer = torch.zeros(2, 9, 48)

    def same_buffer(x, point):
        return buffer.add_(1)

    _, acts = lens.run_with_cache(tokens, "mlp_out", {"mlp_out": same_buffer})
    assert [float(acts["mlp_out", i].mean()) for i in range(3)] == [1, 2, 3]
    embeds = lens.W_E[tokens].clone()
    _, acts = lens.run_with_cache(inputs_embeds=embeds, names="embed")
    embeds.zero_()
    assert acts["embed"].abs().sum() > 0


def test_a_recording_of_some_points_holds_what_they_weigh(any_lens, tokens):
    names = ["blocks.0.mlp.gate", "blocks.0.attn.q_pass", "blocks.1.attn.z", "blocks.0.kv.v"]
    for kv in (None, any_lens.new_kv(batch=2)):
        _, acts = any_lens.run_with_cache(tokens, names, kv=kv)
        for x in acts.values():
            assert x.untyped_storage().nbytes() == x.nbytes


# 5. No swallowed keyword arguments.


def test_a_misspelt_keyword_is_a_type_error(lens, tokens):
    for run in (
        lambda: lens(tokens, stop_layr=1),
        lambda: lens.run_with_cache(tokens, name_filter="all"),
        lambda: lens.run_with_cache(tokens, logits_to_kep=1),
        lambda: lens.run_with_hooks(tokens, hook={}),
        lambda: lens.generate(tokens, max_new_token=3),
        lambda: lens.generate(tokens, 3, temprature=3.0),
        lambda: lens.stream(tokens, 3, temprature=3.0),
        lambda: lens.check(tokens, nams="all"),
    ):
        with pytest.raises(TypeError):
            run()


# 6. Every advertised point is live.


def test_each_point_fires_once_and_in_the_order_of_the_catalogue(every_lens_by_both_paths, tokens):
    lens, fired = every_lens_by_both_paths, []

    class Everything:
        def __call__(self, name, x):
            fired.append((name, tuple(x.shape), x.dtype))
            return x

        def wants(self, name):
            return True

    lens.model(tokens, hook=Everything())
    assert fired == [(p.name, p.shape, p.dtype) for p in lens.points(tokens)]
    assert len(fired) == len({name for name, _, _ in fired})


def test_every_point_is_live_in_every_format_and_with_every_head(every_lens_by_both_paths, tokens):
    lens = every_lens_by_both_paths
    quiet = lens(tokens)
    for name in every_point(lens):

        def nudge(x, point):
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            return x + 0.5 * noise

        assert not torch.equal(lens.run_with_hooks(tokens, {name: nudge}), quiet), name
    watched, acts = lens.run_with_cache(tokens, every_point(lens))
    assert torch.equal(watched, quiet)
    assert list(acts) == every_point(lens)


def test_what_an_edit_changes_is_what_the_maths_says(tokens):
    lens = small_lens("glm", dtype=torch.float64)
    cfg, model = lens.cfg, lens.model
    _, acts = lens.run_with_cache(tokens)

    def norm(x, weight):
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + cfg.rms_eps).sqrt()

    def logits_from(resid):
        return norm(resid, model.ln_final.weight) @ lens.W_U

    last = cfg.n_layers - 1
    add = torch.randn(cfg.d_model, dtype=torch.float64)
    for name in (f"blocks.{last}.resid_post", f"blocks.{last}.mlp_out"):
        found = lens.run_with_hooks(tokens, {name: lambda x, point: x + add})
        assert_close(found, logits_from(acts["resid_post", last] + add))
    found = lens.run_with_hooks(tokens, {f"blocks.{last}.mlp.post": lambda x, point: 2 * x})
    assert_close(found, logits_from(acts["resid_mid", last] + 2 * acts["mlp_out", last]))
    found = lens.run_with_hooks(tokens, {"ln_final.scale": lambda x, point: 3 * x})
    assert_close(found, 3 * acts["logits"])
    zeroed = lens.run_with_cache(
        tokens, hooks={"blocks.0.attn.result": lambda x, point: x.index_fill(2, torch.tensor(1), 0)}
    )[1]
    expected = acts["attn_out", 0] - acts["attn.z", 0][:, :, 1] @ lens.W_O[0, 1]
    assert_close(zeroed["attn_out", 0], expected)
    swapped = lens.run_with_cache(tokens, hooks={"blocks.1.attn.pattern": lambda x, point: x.flip(1)})[1]
    v = acts["kv.v", 1].repeat_interleave(cfg.n_groups, 2)
    assert_close(swapped["attn.z", 1], torch.einsum("bhqk,bkhd->bqhd", acts["attn.pattern", 1].flip(1), v))


def test_moving_a_token_by_its_angles_equals_building_them_by_hand():
    lens = small_lens(dtype=torch.float64)
    tokens = torch.arange(2, 10)[None]
    delta = 3.0
    frequency = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)

    def cos(x, point):
        angle = (point.positions[..., None] + delta * (point.positions[..., None] == 5)) * frequency
        return angle.cos()

    def sin(x, point):
        angle = (point.positions[..., None] + delta * (point.positions[..., None] == 5)) * frequency
        return angle.sin()

    _, moved = lens.run_with_cache(tokens, hooks={"rotary.cos": cos, "rotary.sin": sin})
    _, still = lens.run_with_cache(tokens)
    pair = torch.view_as_complex(still["attn.k", 0][..., :8].unflatten(-1, (-1, 2)).contiguous())
    turned = pair * torch.polar(torch.ones(4, dtype=torch.float64), (5 + delta) * frequency)
    assert_close(moved["attn.k_rot", 0][:, 5], torch.view_as_real(turned).flatten(-2)[:, 5])
    assert_close(moved["attn.k_rot", 0][:, 4], still["attn.k_rot", 0][:, 4])


def test_there_are_no_pass_through_channels_when_all_turn(tokens):
    lens = small_lens(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 1.0})
    names = {local_name(name) for name in every_point(lens)}
    assert not names & {"attn.q_pass", "attn.k_pass"}
    with pytest.raises(glmlens.HookError, match=r"no 'attn.q_pass'"):
        lens.run_with_cache(tokens, "blocks.0.attn.q_pass")


def test_the_table_of_points_is_what_the_code_has():
    alive = {local_name(name) for model_type in ("glm", "glm4") for name in every_point(small_lens(model_type))}
    assert alive == set(POINTS)
    sizes = {"batch": 2, "pos": 9, "query": 9, "key": 9, "model": 48, "head": 4, "kv": 2, "d": 16, "pair": 4}
    sizes |= {"rotated": 8, "rest": 8, "mlp": 56, "vocab": 101, "one": 1}
    for point in small_lens("glm4").points(torch.zeros(2, 9, dtype=torch.long)):
        assert point.shape == tuple(sizes[axis] for axis in axes_of(point.name)), point.name
        assert point.axes == axes_of(point.name)


def test_what_is_costly_is_taken_only_when_named_in_full(lens, tokens):
    for wide in ("all", "*", "blocks.*", "blocks.0.attn.*", "blocks.*.*r*"):
        taken = lens.run_with_cache(tokens, wide)[1]
        assert len(taken) > 5
        assert not any(name.endswith("attn.result") for name in taken)
    with pytest.raises(glmlens.HookError):
        lens.run_with_cache(tokens, "blocks.*.attn.res*")
    assert len(lens.run_with_cache(tokens, "blocks.*.attn.result")[1]) == 3
    assert len(lens.run_with_cache(tokens, "attn.result")[1]) == 3
    assert len(lens.run_with_cache(tokens, "blocks.1.attn.result")[1]) == 1


# 7. Positions are absolute.


def test_positions_are_absolute_also_with_left_padding(lens):
    tokens = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    seen = {}

    def look(x, point):
        seen[point.name, point.step] = (point.positions.tolist(), point.key_positions.tolist())
        return x

    lens.run_with_hooks(tokens, {"blocks.0.resid_pre": look}, attention_mask=mask)
    expected = [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert seen["blocks.0.resid_pre", 0] == (expected, expected)
    lens.generate(tokens, 3, attention_mask=mask, hooks={"blocks.1.attn.z": look}, stop_ids=())
    assert seen["blocks.1.attn.z", 2][0] == [[4], [6]]
    assert seen["blocks.1.attn.z", 2][1] == [[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]
    with pytest.raises(ValueError, match="whether they are padding cannot be seen"):
        lens.generate(tokens, 1, hooks={"logits": look}, stop_ids=())
    lens.generate(tokens, 1, hooks={"logits": look}, stop_ids=(), attention_mask=torch.ones_like(tokens))
    assert seen["logits", 0][0] == [[4], [4]]


def test_a_point_says_where_it_is(lens, tokens):
    seen = []

    def look(x, point):
        seen.append(point)
        return x

    lens.run_with_hooks(tokens, {"blocks.2.attn.pattern": look, "embed": look})
    embed, pattern = seen
    assert (embed.name, embed.layer, embed.axes, embed.step) == ("embed", None, ("batch", "pos", "model"), 0)
    assert (pattern.layer, pattern.local) == (2, "attn.pattern")
    assert pattern.axes == ("batch", "head", "query", "key")
    assert pattern.shape == (2, 4, 9, 9)


def test_an_edit_can_be_held_to_positions_and_steps(lens, tokens):
    def zero(x, point):
        return x.zero_()

    _, acts = lens.run_with_cache(
        tokens, "blocks.1.resid_pre", {"blocks.1.resid_pre": glmlens.only(zero, positions=[2, 5])}
    )
    zeroed = (acts["blocks.1.resid_pre"] == 0).all(-1)
    assert zeroed.tolist() == [[i in (2, 5) for i in range(9)]] * 2
    _, acts = lens.run_with_cache(tokens, "blocks.1.kv.v", {"blocks.1.kv.v": glmlens.only(zero, positions=3)})
    assert (acts["blocks.1.kv.v"] == 0).all(-1).all(-1).tolist() == [[i == 3 for i in range(9)]] * 2
    _, acts = lens.run_with_cache(tokens, "blocks.1.attn.pattern", {"attn.pattern": glmlens.only(zero, positions=3)})
    assert (acts["blocks.1.attn.pattern"] == 0).all(-1).all(1).tolist() == [[i == 3 for i in range(9)]] * 2
    run = lens.generate(
        tokens, 4, names="blocks.0.mlp_out", stop_ids=(), hooks={"blocks.0.mlp_out": glmlens.only(zero, steps=[1, 2])}
    )
    assert (run.acts["blocks.0.mlp_out"] == 0).all(-1).tolist() == [[i in (9, 10) for i in range(12)]] * 2


# And the rest of what hooks promise.


def test_hooks_run_in_the_order_given_and_a_recording_comes_after_them(lens, tokens):
    hooks = [("blocks.1.mlp_out", lambda x, point: x * 0 + 1), ("blocks.*.mlp_out", lambda x, point: x * 3)]
    _, acts = lens.run_with_cache(tokens, "mlp_out", hooks)
    assert (acts["mlp_out", 1] == 3).all()
    _, acts = lens.run_with_cache(tokens, "mlp_out", hooks[::-1])
    assert (acts["mlp_out", 1] == 1).all()


def test_a_run_without_logits_ends_after_the_last_named_point(lens, tokens):
    entered = []
    handle = lens.model.blocks[2].register_forward_pre_hook(lambda *_: entered.append(1))
    logits, acts = lens.run_with_cache(tokens, "blocks.1.attn.z", logits=False)
    handle.remove()
    assert logits is None
    assert not entered
    assert torch.equal(acts["attn.z", 1], lens.run_with_cache(tokens, "attn.z")[1]["attn.z", 1])


def test_recordings_are_read_by_name_by_layer_and_stacked(lens, tokens):
    _, acts = lens.run_with_cache(tokens)
    assert acts["resid_post"].shape == (3, 2, 9, 48)
    assert torch.equal(acts["resid_post"][1], acts["resid_post", 1])
    assert torch.equal(acts["resid_post", -1], acts["blocks.2.resid_post"])
    with pytest.raises(glmlens.HookError, match=r"was not recorded.*resid_post"):
        acts["resid_pots"]
    with pytest.raises(KeyError, match="was not recorded"):
        acts["resid_post", 9]
    assert acts.get("nope", 5) == 5
    assert "resid_post" in acts
    assert "blocks.0.resid_post" in acts
    assert "nope" not in acts
    _, some = lens.run_with_cache(tokens, ["blocks.0.attn.z", "blocks.2.attn.z"])
    with pytest.raises(glmlens.HookError, match=r"layers \[0, 2\] only"):
        some["attn.z"]
    assert len(repr(acts).splitlines()) < 45


def test_check_says_what_would_be_recorded_and_fires_without_computing(any_lens, tokens):
    def edit(x, point):
        return x + torch.ones(x.shape[-1])

    def needs_numbers(x, point):
        return x * 0 if float(x.max()) > 0 else x

    check = any_lens.check(tokens, names="all", hooks=[("blocks.*.attn.z", edit), ("blocks.1.mlp.post", needs_numbers)])
    _, acts = any_lens.run_with_cache(tokens)
    assert [(p.name, p.shape) for p in check.points] == [(n, tuple(x.shape)) for n, x in acts.items()]
    assert [len(names) for _, names in check.fires] == [3, 1]
    assert "needs_numbers at blocks.1.mlp.post" in check.not_tried[0]
    with pytest.raises(glmlens.HookError, match="expected \\(2, 9, 4, 16\\)"):
        any_lens.check(tokens, hooks={"blocks.1.attn.z": lambda x, point: x[:, :1]})
    kv = any_lens.new_kv(batch=2)
    any_lens(tokens, kv=kv)
    assert any_lens.check(tokens, names="blocks.0.kv.k", kv=kv).points[0].shape == (2, 18, 2, 16)
    assert kv.length == 9


def test_patching_with_a_recording_reproduces_the_recorded_run(any_lens, tokens):
    clean, acts = any_lens.run_with_cache(tokens, ["resid_post"])
    corrupt = tokens.flip(1)
    patched = any_lens.run_with_hooks(corrupt, {"blocks.2.resid_post": lambda x, point: acts[point.name]})
    assert torch.equal(patched, clean)


def test_a_hook_of_transformerlens_knows_its_layer_and_its_name(lens, tokens):
    """`hook.layer()` and `hook.name` are what hooks written for TransformerLens ask."""
    seen = []

    def theirs(resid, hook):
        seen.append((hook.layer(), hook.layer, hook.name))
        return resid * (0.5 if hook.layer() == 1 else 1.0)

    def ours(x, point):
        return x * 0.5

    found = lens.run_with_hooks(tokens, {"resid_post": theirs})
    assert [layer for layer, *_ in seen] == [layer for _, layer, _ in seen] == [0, 1, 2]
    assert seen[1][2] == "blocks.1.resid_post"
    assert torch.equal(found, lens.run_with_hooks(tokens, {"blocks.1.resid_post": ours}))


@pytest.mark.parametrize(
    ("hooks", "said"),
    [
        ("resid_post", "hooks are"),
        (lambda x, point: x, "hooks are"),
        (3, "hooks are"),
        (("resid_post", lambda x, point: x), "put the pair of 'resid_post' in a list"),
        (["resid_post"], "got 'resid_post'"),
        ([("resid_post", "mlp_out")], "no function"),
        ([("resid_post", lambda x, point: x, 3)], "hooks are"),
        ([(lambda name: True, lambda x, point: x)], "hooks are"),
        ({"resid_post": [lambda x, point: x, lambda x, point: x]}, "a pair for each"),
        ({"resid_post": None}, "no function"),
        ({"resid_post": torch.zeros(1)}, "no function"),
        ({"resid_post": lambda x: x}, r"cannot be called as fn\(x, point\)"),
        ({"resid_post": lambda x, point, more: x}, r"cannot be called as fn\(x, point\)"),
        ({"resid_post": lambda: 0}, r"cannot be called as fn\(x, point\)"),
        ({"resid_post": only(lambda x: x, positions=3)}, r"cannot be called as fn\(x, point\)"),
    ],
)
def test_what_is_no_hook_is_refused_before_anything_runs(hooks, said):
    with pytest.raises(HookError, match=said):
        list_edits(hooks)


def test_a_hook_may_take_more_than_it_must(lens, tokens):
    def scaled(x, point, factor=0.5):
        return x * factor

    def any_way(*places, **named):
        return places[0] * 0.5

    for fn in (scaled, any_way, functools.partial(scaled, factor=0.5)):
        assert torch.equal(
            lens.run_with_hooks(tokens, {"resid_mid": fn}),
            lens.run_with_hooks(tokens, {"resid_mid": lambda x, point: x * 0.5}),
        )


@pytest.mark.parametrize("wrong", [None, "resid", 3])
def test_only_restricts_a_function(wrong):
    with pytest.raises(HookError, match="a function fn"):
        only(wrong, positions=1)
