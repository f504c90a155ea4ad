"""Old public names work for one release and say what they are called now."""

import pytest
from conftest import small_lens

import glmlens
from glmlens.deprecated import rename_attribute, rename_keyword, rename_method, resolve_old_names


def test_every_old_name_of_a_package_is_the_new_one_and_warns():
    for package in (glmlens.patch, glmlens.cache, glmlens.analysis, glmlens.plot):
        table = package.OLD_NAMES
        assert table
        for old, new in table.items():
            target = glmlens
            for part in new.split(".")[1:]:
                target = getattr(target, part)
            with pytest.warns(DeprecationWarning, match=new.replace(".", r"\.")):
                assert getattr(package, old) is target
            assert old not in package.__all__


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'never'"):
        resolve_old_names("glmlens.patch", {})("never")


def test_an_old_keyword_is_passed_on_and_both_are_an_error():
    @rename_keyword("names", "position_names")
    def places(*, position_names=()):
        return position_names

    with pytest.warns(DeprecationWarning, match=r"places\(names=\) is now called position_names="):
        assert places(names=("S2",)) == ("S2",)
    assert places(position_names=("end",)) == ("end",)
    with pytest.raises(TypeError, match="both names= and position_names="):
        places(names=(), position_names=())


def test_an_old_method_and_an_old_attribute_are_the_new_ones():
    class Result:
        size = 3
        length = rename_attribute("length", "size")
        rows = rename_method("rows", "summary")

        def summary(self, n):
            return [self.size] * n

    with pytest.warns(DeprecationWarning, match=r"Result\.length is now called \.size"):
        assert Result().length == 3
    with pytest.warns(DeprecationWarning, match=r"Result\.rows is now called \.summary"):
        assert Result().rows(2) == [3, 3]


def test_methods_that_were_renamed_still_answer():
    lens = small_lens("glm")
    _, acts = lens.run_with_cache([1, 2, 3], "resid_post")
    with pytest.warns(DeprecationWarning, match="summary_table"):
        assert acts.rows() == acts.summary_table()
    with pytest.warns(DeprecationWarning, match="with_dictionary"), pytest.raises(TypeError):
        lens.spliced()
    with pytest.warns(DeprecationWarning, match="GenerationResult"):
        assert glmlens.Run is glmlens.GenerationResult


def test_a_timeline_still_answers_to_its_old_names():
    lens = small_lens("glm")
    line = glmlens.timeline.record_timeline(lens, [1, 2, 3], 2, hooks={"attn_out": lambda x, point: x}, stop_ids=())
    for owner, old, new in (
        (line, "moments", "steps"),
        (line, "at", "cache_operations"),
        (line, "last", "max_new_tokens"),
        (line.events[0], "what", "edit_name"),
    ):
        with pytest.warns(DeprecationWarning, match=rf"{old} is now called \.{new}"):
            assert getattr(owner, old) is getattr(owner, new)
    with pytest.warns(DeprecationWarning, match="step_record"):
        record = line.moment(1)
    assert record is line.step_record(1)
    for owner, arguments in ((line, (1,)), (record, ())):
        with pytest.warns(DeprecationWarning, match="restore_state"):
            assert owner.memory(*arguments).kv.length == 3
    with pytest.warns(DeprecationWarning, match="position_names="):
        glmlens.timeline.schedule_edits(lens, {"attn_out": lambda x, point: x}, names={"end": 2})
