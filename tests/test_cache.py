"""Operations on the KV cache: an edited cache is the cache of a run with that edit."""

import pytest
import torch
from conftest import small_lens
from torch.testing import assert_close

import glmlens
from glmlens import cache, only, timeline
from glmlens.cache import CacheError
from glmlens.cache.selection import to_index_tuple
from glmlens.hook_points import HookError
from glmlens.model import apply_rotary, rotary_angles


def close(found, expected, atol=1e-9):
    assert_close(found, expected, rtol=0, atol=atol * max(1.0, float(expected.abs().max())))


@pytest.fixture(params=["eager", "sdpa"])
def lens(request):
    return small_lens("glm4", request.param, dtype=torch.float64)


@pytest.fixture
def eager():
    return small_lens(dtype=torch.float64)


def fill_cache(lens, tokens):
    kv = lens.new_kv(batch=tokens.shape[0])
    lens(tokens, kv=kv)
    return kv


def double(x, at, layer):
    return 2 * x


OPERATIONS = {
    "edit": cache.edit(keys=double, values=double, layer=1, position=3),
    "ablate": cache.ablate(layer=[0, 2], kv=1, position=[1, 2]),
    "mean": cache.ablate(how="mean", kv=0),
    "int4": cache.quantise(4, group=2),
    "int8": cache.quantise(8, keys="token", values="channel", layer=2),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_leaves_the_original_cache_and_changes_no_other_entry(lens, tokens, name):
    kv, op = fill_cache(lens, tokens), OPERATIONS[name]
    before = kv.keys.clone(), kv.values.clone(), kv.positions.clone()
    made = op(kv)
    for now, was in zip((kv.keys, kv.values, kv.positions), before, strict=True):
        assert torch.equal(now, was)
    lens(tokens, kv=made)
    assert torch.equal(kv.keys, before[0])
    assert (kv.length, made.length) == (9, 18)
    changed = ((made.values[:, :, :9] != kv.values[:, :, :9]) | (made.keys[:, :, :9] != kv.keys[:, :, :9])).any(-1)
    meant = torch.zeros_like(changed)
    for layer in op.selection.list_layers(3, 2):
        meant[layer] = op.selection.mask_entries(kv.positions[:, :9])[..., None] & op.selection.mask_heads(
            2, changed.device
        )
    assert not bool((changed & ~meant).any())
    assert bool(changed.any())


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_on_a_cache_equals_its_hooks_on_the_entries_a_run_reads(lens, tokens, name):
    """With own=False; without it, a selection of all positions also edits the entry that the step itself writes."""
    op, prompt = OPERATIONS[name], tokens[:, :6]
    kv = fill_cache(lens, prompt)
    expected = lens(tokens[:, 6:7], kv=op(kv))
    close(lens.run_with_hooks(tokens[:, 6:7], op.hooks(lens, own=False), kv=kv.fork()), expected)
    mine_too = lens.run_with_hooks(tokens[:, 6:7], op.hooks(lens), kv=kv.fork())
    if op.selection.position is None:
        assert not torch.equal(mine_too, expected)
    else:
        close(mine_too, expected)


def test_an_entry_edited_before_continuing_equals_a_patch_of_the_written_entry_in_a_full_run(lens, tokens):
    """Only the tokens after the edit read the patched entry."""
    kv, late = fill_cache(lens, tokens[:, :6]), tokens[:, 6:]
    op = cache.edit(keys=lambda x, at, layer: -x, values=lambda x, at, layer: x + 1, layer=1, kv=0, position=2)
    found = lens(late, kv=op(kv))

    def negative(x, point):
        x[:, :, 0] *= -1
        return x

    def plus(x, point):
        x[:, :, 0] += 1
        return x

    resid = lens.run_with_cache(tokens[:, :6], "blocks.1.resid_post")[1]["resid_post", 1]
    hooks = [
        ("blocks.1.kv.k_new", only(negative, positions=2)),
        ("blocks.1.kv.v_new", only(plus, positions=2)),
        ("blocks.1.resid_post", lambda x, point: torch.cat([resid, x[:, 6:]], 1)),
    ]
    close(found, lens.run_with_hooks(tokens, hooks)[:, 6:])


def test_between_steps_and_as_a_hook_at_later_steps_is_the_same_generation(lens, tokens):
    op = cache.ablate(layer=1, position=[2, 4])
    first = lens.generate(tokens, 3, stop_ids=())
    then = lens.generate(first.tokens[:, -1:], 4, kv=op(first.kv), stop_ids=(), names="logits")
    hooked = lens.generate(tokens, 7, stop_ids=(), hooks=op.hooks(lens, steps=range(3, 7)), names="logits")
    assert torch.equal(hooked.tokens[:, 9 + 3 :], then.tokens[:, 1:])
    close(hooked.acts["logits"][:, -4:], then.acts["logits"][:, -4:])


def test_eviction_is_masking_the_columns(eager, tokens):
    kv = fill_cache(eager, tokens[:, :6])
    for op, gone in [
        (cache.evict(position=[1, 3]), [1, 3]),
        (cache.evict(cache.keep_window(2)), [0, 1, 2, 3]),
        (cache.evict(cache.keep_window(2, sinks=1)), [1, 2, 3]),
    ]:
        small = op(kv)
        assert small.length == 6 - len(gone)

        def masked(x, point, gone=gone):
            x[..., gone] = torch.finfo(x.dtype).min
            return x

        hooks = {"blocks.*.attn.scores": masked}
        expected = eager.run_with_hooks(tokens[:, 6:8], hooks, kv=kv.fork())
        close(eager(tokens[:, 6:8], kv=small), expected)
    hooked = eager.run_with_hooks(tokens[:, 6:8], cache.evict(position=[1, 3]).hooks(eager), kv=kv.fork())
    close(eager(tokens[:, 6:8], kv=cache.evict(position=[1, 3])(kv)), hooked)


def test_heads_of_one_layer_can_each_lack_their_own_entries(eager, tokens):
    """As each head of H2O keeps its own entries; later entries are kept."""
    kv = fill_cache(eager, tokens[:1, :6])
    attention = torch.rand(2, 6, generator=torch.Generator().manual_seed(3))
    kept = [set(attention[head].topk(3).indices.tolist()) for head in range(2)]
    ops = [cache.evict(cache.keep_heavy_hitters(attention[head][None], 3), layer=1, kv=head) for head in range(2)]
    hooks = [hook for op in ops for hook in op.hooks(eager)]

    def masked(x, point):
        for head in range(4):
            x[:, head, :, sorted(set(range(6)) - kept[head // 2])] = torch.finfo(x.dtype).min
        return x

    by_hand = {"blocks.1.attn.scores": masked}
    asked = {"max_new_tokens": 3, "kv": kv, "stop_ids": (), "names": "logits"}
    found, expected = (eager.generate(tokens[:1, 6:8], hooks=h, **asked) for h in (hooks, by_hand))
    close(found.acts["logits"], expected.acts["logits"])
    assert kept[0] != kept[1]
    with pytest.raises(CacheError, match=r"share a cache's entries: .hooks"):
        ops[0](kv)


def test_a_window_as_a_hook_equals_the_window_of_the_cache_plus_the_entries_of_the_step(eager, tokens):
    kv, op = fill_cache(eager, tokens[:, :6]), cache.evict(cache.keep_window(2, sinks=1))
    expected = eager(tokens[:, 6:8], kv=op(kv))
    close(eager.run_with_hooks(tokens[:, 6:8], op.hooks(eager, own=False), kv=kv.fork()), expected)


def test_the_token_after_an_evicted_newest_entry_gets_the_position_it_would_have_had(lens, tokens, tmp_path):
    kv = fill_cache(lens, tokens)
    lens(tokens[:, :1], kv=kv)
    small = cache.evict(position=[4, 9])(kv)
    again = cache.evict(position=2)(small)
    small.save(tmp_path / "kv")
    for same in (small.fork(), cache.quantise(8)(small), type(kv).load(tmp_path / "kv"), again):
        lens(tokens[:, :1], kv=same)
        assert same.next_positions().tolist() == [11, 11]
        at, calls = same.positions[0, : same.length].tolist(), same.calls[0, : same.length].tolist()
        assert (at[-1], calls[-1]) == (10, 2)
        assert not {4, 9} & set(at)
    assert cache.reposition(lens, 5)(small).next_positions().tolist() == [15, 15]
    assert small.next_positions().tolist() == [10, 10]
    source = fill_cache(lens, tokens[:1])
    longer = cache.graft(lens, source, of=[1, 2, 3], at=[1])(cache.evict(position=8)(source))
    assert longer.next_positions().tolist() == [11]


def test_a_query_without_any_entry_sees_itself_and_no_later_entry(eager, tokens):
    for op, seen in [(cache.evict(position=0), 1), (cache.evict(cache.keep_window(2)), 7)]:
        _, acts = eager.run_with_cache(tokens, "attn.pattern", op.hooks(eager))
        pattern = acts["attn.pattern"]
        assert torch.equal(pattern, pattern.tril())
        assert torch.equal(pattern[..., :seen, :], torch.eye(9, dtype=pattern.dtype)[:seen].expand(3, 2, 4, seen, 9))
        assert not bool(pattern[..., seen:, :seen].any())


def test_rows_that_evict_different_entries_keep_their_own(lens, tokens):
    kv = fill_cache(lens, tokens[:, :6])
    attention = torch.rand(2, 6, generator=torch.Generator().manual_seed(3))
    small = cache.evict(cache.keep_heavy_hitters(attention, 2, recent=1))(kv)
    for row in range(2):
        best = sorted(range(5), key=lambda i: -float(attention[row, i]))[:2]
        there = small.positions[row, : small.length]
        assert sorted(there[there >= 0].tolist()) == sorted([*best, 5])
        alone = cache.evict(position=[i for i in range(5) if i not in best])(
            fill_cache(lens, tokens[row : row + 1, :6])
        )
        close(lens(tokens[row : row + 1, 6:], kv=alone), lens(tokens[:, 6:], kv=small.fork())[row : row + 1])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_numbers_are_those_that_integers_of_that_size_can_store(lens, tokens, bits):
    kv = fill_cache(lens, tokens)
    made = cache.quantise(bits, group=4)(kv)
    for layer, row, head in [(0, 0, 0), (2, 1, 1)]:
        values, keys = kv.values[layer, row, :9, head], kv.keys[layer, row, :9, head]
        for token in range(9):
            check(values[token], made.values[layer, row, token, head], bits)
        for channel in range(16):
            for start in (0, 4, 8):
                here = slice(start, min(start + 4, 9))
                check(keys[here, channel], made.keys[layer, row, here, head, channel], bits)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_groups_are_of_the_selected_entries_only(lens, tokens, side):
    op = cache.quantise(3, keys="channel", values="channel", group=4, position=[1, 2, 5, 6, 7])
    kv = fill_cache(lens, tokens)
    made, x = getattr(op(kv), side), getattr(kv, side)
    for group in ([1, 2, 5, 6], [7]):
        for channel in range(16):
            check(x[1, 0, group, 1, channel], made[1, 0, group, 1, channel], 3)
    assert torch.equal(made[:, :, [0, 3, 4, 8]], x[:, :, [0, 3, 4, 8]])


def test_padding_is_in_no_group(lens, tokens):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    kv, op = lens.new_kv(batch=2), cache.quantise(3, values="channel", group=4)
    lens(tokens, kv=kv, attention_mask=mask)
    alone = fill_cache(lens, tokens[:1, 3:])
    close(lens(tokens[:, :2], kv=op(kv))[:1], lens(tokens[:1, :2], kv=op(alone)))


def check(x, found, bits):
    """Compare with numbers stored in a real array of 8-bit integers."""
    low, step = x.min(), (x.max() - x.min()) / (2**bits - 1)
    stored = ((x - low) / step).round().to(torch.uint8) if float(step) else torch.zeros(len(x), dtype=torch.uint8)
    assert int(stored.max()) <= 2**bits - 1
    assert_close(found, stored.to(x.dtype) * step + low, rtol=0, atol=1e-12)


def test_quantising_twice_is_quantising_once(lens, tokens):
    op = cache.quantise(4, keys="token")
    once = op(fill_cache(lens, tokens))
    close(op(once).values[:, :, :9], once.values[:, :, :9], 1e-12)


def test_a_repositioned_cache_is_that_of_the_prompt_at_those_positions(lens, tokens):
    moved = cache.reposition(lens, 40)(fill_cache(lens, tokens))
    kv = lens.new_kv(batch=2)
    lens(tokens, kv=kv, position_ids=torch.arange(40, 49))
    close(moved.keys[:, :, :9], kv.keys[:, :, :9])
    assert torch.equal(moved.positions[:, :9], kv.positions[:, :9])
    back = cache.reposition(lens, -40)(moved)
    close(lens(tokens[:, :1], kv=back), lens(tokens[:, :1], kv=fill_cache(lens, tokens)))


def test_one_repositioned_entry_is_rotated_as_by_hand_and_no_other_moves(lens, tokens):
    kv = fill_cache(lens, tokens)
    moved = cache.reposition(lens, 5, position=3)(kv)
    _, acts = lens.run_with_cache(tokens, "blocks.1.attn.k")
    cos, sin = rotary_angles(torch.full((2, 1), 8), lens.cfg, torch.float64)
    close(moved.keys[1, :, 3:4, :, :8], apply_rotary(acts["attn.k", 1][:, 3:4, :, :8], cos, sin))
    others = [i for i in range(9) if i != 3]
    assert torch.equal(moved.keys[:, :, others], kv.keys[:, :, others])
    assert moved.positions[0, :9].tolist() == [0, 1, 2, 8, 4, 5, 6, 7, 8]


def test_repositioning_as_a_hook_is_repositioning_the_cache(lens, tokens):
    kv, op = fill_cache(lens, tokens), cache.reposition(lens, -2, position=[4, 5])
    expected = lens(tokens[:, :1], kv=op(kv))
    close(lens.run_with_hooks(tokens[:, :1], op.hooks(lens), kv=kv.fork()), expected)
    run = lens.generate(tokens, 4, hooks=op.hooks(lens, steps=[2, 3]), names="logits", stop_ids=())
    first = lens.generate(tokens, 2, stop_ids=())
    then = lens.generate(first.tokens[:, -1:], 2, kv=op(first.kv), names="logits", stop_ids=())
    close(run.acts["logits"][:, -2:], then.acts["logits"][:, -2:])


@pytest.mark.parametrize("gone", [[2, 3, 7], [2, 10], [9, 10], range(11)], ids=str)
def test_eviction_as_a_hook_at_later_steps_is_eviction_between_steps(eager, tokens, gone):
    """Also of the newest entry, at position 10."""
    op = cache.evict(position=gone)
    first = eager.generate(tokens, 3, stop_ids=())
    then = eager.generate(first.tokens[:, -1:], 4, kv=op(first.kv), names="logits", stop_ids=())
    run = eager.generate(tokens, 7, hooks=op.hooks(eager, steps=range(3, 7)), names="logits", stop_ids=())
    assert torch.equal(run.tokens[:, 12:], then.tokens[:, 1:])
    close(run.acts["logits"][:, -4:], then.acts["logits"][:, -4:])


def test_closing_gaps_counts_positions_inside_the_cache(lens, tokens):
    small = cache.evict(cache.keep_window(3, sinks=2))(fill_cache(lens, tokens))
    closed = cache.close_gaps(lens)(small)
    assert small.positions[0, :5].tolist() == [0, 1, 6, 7, 8]
    assert closed.positions[0, :5].tolist() == [0, 1, 2, 3, 4]
    by_hand = cache.reposition(lens, -4, position=[6, 7, 8])(small)
    close(closed.keys, by_hand.keys, 1e-12)


def test_swapped_entries_are_those_of_the_other_run(lens, tokens):
    a, b = fill_cache(lens, tokens[:1]), fill_cache(lens, tokens[1:])
    made = cache.swap(b, layer=[1, 2], kv=1, position=[2, 7])(a)
    for layer, head, position in [(1, 1, 2), (2, 1, 7)]:
        for found, theirs in zip(
            cache.read_entry(made, layer, head, position), cache.read_entry(b, layer, head, position), strict=True
        ):
            assert torch.equal(found, theirs)
    assert torch.equal(cache.read_entry(made, 0, 1, 2)[0], cache.read_entry(a, 0, 1, 2)[0])
    all_of_it = cache.swap(b)(a)
    assert torch.equal(lens(tokens[:1, :1], kv=all_of_it), lens(tokens[:1, :1], kv=b.fork()))
    with pytest.raises(CacheError, match="entries at 0 to 8 alone"):
        cache.swap(b)(fill_cache(lens, torch.cat([tokens[:1], tokens[:1]], 1)))


def test_a_fork_continues_two_ways(lens, tokens):
    kv = fill_cache(lens, tokens)
    kv.truncate(9)
    plain = lens.generate(tokens[:, :1], 5, kv=kv, stop_ids=())
    other = lens.generate(tokens[:, :1], 5, kv=cache.ablate(position=range(5))(kv), stop_ids=())
    again = lens.generate(tokens[:, :1], 5, kv=kv, stop_ids=())
    assert torch.equal(plain.tokens, again.tokens)
    assert not torch.equal(plain.kv.values[:, :, :9], other.kv.values[:, :, :9])


def test_a_graft_takes_the_positions_of_the_entries_it_replaces(lens, tokens):
    """A graft from a run of the same tokens at other positions changes nothing, whatever its length."""
    kv = fill_cache(lens, tokens[:1])
    source = lens.new_kv(batch=1)
    lens(tokens[:1], kv=source, position_ids=torch.arange(20, 29))
    same = cache.graft(lens, source, of=range(23, 26), at=range(3, 6))(kv)
    assert same.tokens[0, : same.length].tolist() == tokens[0].tolist()
    close(lens(tokens[:1, :2], kv=same), lens(tokens[:1, :2], kv=kv))


@pytest.mark.parametrize("many", [1, 5])
def test_a_graft_of_another_length_moves_the_entries_after_it(lens, tokens, many):
    kv, source = fill_cache(lens, tokens[:1]), fill_cache(lens, tokens[1:])
    made = cache.graft(lens, source, of=range(1, 1 + many), at=[2, 3, 4])(kv)
    assert made.positions[0, : made.length].tolist() == list(range(6 + many))
    expected = [*tokens[0, :2].tolist(), *tokens[1, 1 : 1 + many].tolist(), *tokens[0, 5:].tolist()]
    assert made.tokens[0, : made.length].tolist() == expected
    close(made.values[:, :, 2 + many : 6 + many], kv.values[:, :, 5:9])
    ids = torch.arange(9) + torch.where(torch.arange(9) >= 5, many - 3, 0)
    moved = lens.new_kv(batch=1)
    lens(tokens[:1], kv=moved, position_ids=ids)
    close(made.keys[0, :, 2 + many :][:, :4], moved.keys[0, :, 5:9])  # in layer 0 keys depend on their token only
    run = lens.generate(tokens[:1, :1], 3, kv=made, stop_ids=())
    assert run.kv.positions[0, : run.kv.length].tolist() == list(range(6 + many + 3))


def test_a_graft_as_a_hook_is_a_graft_between_steps(lens, tokens):
    source = fill_cache(lens, tokens[1:])
    op = cache.graft(lens, source, of=[4, 5], at=[2, 3])
    first = lens.generate(tokens[:1], 3, stop_ids=())
    then = lens.generate(first.tokens[:, -1:], 3, kv=op(first.kv), stop_ids=(), names="logits")
    run = lens.generate(tokens[:1], 6, hooks=op.hooks(lens, steps=[3, 4, 5]), stop_ids=(), names="logits")
    assert torch.equal(run.tokens[:, 12:], then.tokens[:, 1:])
    close(run.acts["logits"][:, -3:], then.acts["logits"][:, -3:])
    longer = cache.graft(lens, source, of=[4, 5, 6], at=[2, 3])
    with pytest.raises(CacheError, match=r"3 entries in the place of 2.*between steps"):
        longer.hooks(lens)
    line = timeline.record_timeline(lens, tokens[:1], 6, at={3: longer}, stop_ids=())
    then = lens.generate(first.tokens[:, -1:], 3, kv=longer(first.kv), stop_ids=())
    assert line.tokens[3:] == then.tokens[0, 1:].tolist()


def test_an_entity_grafted_by_its_name_changes_the_answer():
    """Replacing France's cached keys and values with Japan's changes the answer to Japan's capital."""
    lens = glmlens.load(dtype="float32")
    kvs, answers = {}, {}
    for country in ("France", "Japan"):
        prompt = lens.to_tokens(f"The capital of {country} is")
        kvs[country] = lens.new_kv()
        lens(prompt[:, :-1], kv=kvs[country])
        answers[country] = lens.generate(prompt, 1).text
    made = cache.graft(lens, kvs["Japan"], of=" Japan", at=" France")(kvs["France"])
    assert answers["France"] != answers["Japan"]
    assert " Japan" in [word.replace("·", " ") for _, word, _ in cache.list_entries(lens, made)]
    assert lens.generate(" is", 1, kv=made).text == answers["Japan"]
    with pytest.raises(CacheError, match="is not there"):
        cache.graft(lens, kvs["Japan"], of=" Japan", at=" Spain")(kvs["France"])


def test_entries_are_found_by_their_text_with_the_step_that_wrote_them():
    lens = glmlens.load(dtype="float32")
    words = [lens.tokenizer.label(i) for i in lens.tokenizer.list_word_ids()[:3]]
    text = "".join(lens.tokenizer.decode([i]) for i in lens.tokenizer.list_word_ids()[:3])
    run = lens.generate(text, 3, stop_ids=())
    listed = cache.list_entries(lens, run.kv)
    prefix = len(lens.tokenizer.prefix)
    assert [word for _, word, _ in listed[prefix : prefix + 3]] == words
    assert [call for _, _, call in listed] == [0] * (prefix + 3) + [1, 2]
    assert [at for at, _, _ in listed] == list(range(prefix + 5))
    last = lens.tokenizer.decode([lens.tokenizer.list_word_ids()[2]])
    assert prefix + 2 in [cache.find_entries(lens, run.kv, last, 0)[0]]
    with pytest.raises(CacheError, match="is not there"):
        cache.find_entries(lens, run.kv, lens.tokenizer.decode([lens.tokenizer.list_word_ids()[9]]) * 3)


def test_entries_that_are_not_there_are_errors_that_list_what_is(lens, tokens):
    kv = fill_cache(lens, tokens)
    for make, message in [
        (lambda: cache.ablate(layer=3)(kv), "layer 3 asked for; there are 3, 0 to 2"),
        (lambda: cache.ablate(kv=2)(kv), "kv 2 asked for"),
        (lambda: cache.ablate(position=9)(kv), "no entry at position 9; there are 0 to 8"),
        (lambda: cache.ablate(position=-1), "whole numbers from 0"),
        (lambda: cache.evict(position=9)(kv), "no entry at position 9; there are 0 to 8"),
        (lambda: cache.evict(lambda kv: torch.ones(2, 3))(kv), r"torch.float32 \(2, 3\); expected bool \(2, 9\)"),
        (lambda: cache.evict(position=1).hooks(small_lens(attention="sdpa")), "between steps"),
        (lambda: to_index_tuple(" France", "position"), r"cache.find_entries\(lens, kv, ' France'\)"),
        (lambda: to_index_tuple([1.5], "position"), "whole numbers, 3 or "),
        (lambda: cache.quantise(4, group=0), "at least 1 entry"),
        (lambda: cache.evict(), "give position="),
        (lambda: cache.edit(), "give keys= or values="),
        (lambda: cache.edit(keys=lambda x, at, layer: x[:1])(kv), "expected"),
        (lambda: cache.reposition(lens, -1)(kv), "before position 0"),
        (lambda: cache.reposition(lens, 1, position=9)(kv), "no entry at position 9"),
        (lambda: lens.run_with_hooks(tokens, cache.reposition(lens, -1).hooks(lens)), "before position 0"),
        (lambda: cache.read_entry(kv, 0, 0, 40), "not every row"),
        (lambda: cache.quantise(0), "expected 1 to 16"),
        (lambda: cache.graft(lens, kv, of=[1], at=[2])(kv), "one row"),
    ]:
        with pytest.raises(CacheError, match=message):
            make()


@pytest.mark.parametrize("op", [cache.evict(position=20), cache.ablate(position=20)], ids=["evict", "ablate"])
def test_a_hook_on_entries_that_never_come_is_an_error(eager, tokens, op):
    with pytest.raises(HookError, match="asked for position 20"):
        eager.generate(tokens[:1], 3, hooks=op.hooks(eager))
    with pytest.raises(HookError, match="never came"):
        timeline.record_timeline(eager, tokens[:1], 3, hooks=op.hooks(eager))
    moved = cache.reposition(eager, 1, position=20).hooks(eager)
    with pytest.raises(HookError, match="20"):
        eager.run_with_hooks(tokens, moved)


def test_operations_on_an_empty_cache_leave_it_empty(lens):
    for op in (
        *OPERATIONS.values(),
        cache.reposition(lens, 1),
        cache.close_gaps(lens),
        cache.evict(cache.keep_window(3)),
    ):
        selection = getattr(op, "selection", None)
        if selection is None or selection.position is None:
            assert op(lens.new_kv()).length == 0
