"""The command line."""

import pytest
from conftest import write_checkpoint

from glmlens.cli import main


def test_demo_opens_any_checkpoint(tmp_path, capsys):
    write_checkpoint(tmp_path, 3)
    assert main(["demo", "--model", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for part in ("most probable next tokens", "previous token", "induction", "set to zero", "nats per token"):
        assert part in said


def test_a_checkpoint_that_is_not_there_is_one_line_and_status_2(capsys):
    assert main(["demo", "--model", "/no/such/folder"]) == 2
    assert capsys.readouterr().err.strip().startswith("glmlens: /no/such/folder: no such folder")


@pytest.mark.weights
def test_demo_finds_the_induction_head_of_the_real_model(real_model, capsys):
    main(["demo", "--model", str(real_model)])
    said = capsys.readouterr().out
    assert "' Mary'" in said
    assert "induction      18.6 0." in said
    before, after = (float(x) for x in said.split("goes from ")[1].split(" nats")[0].split(" to "))
    assert after > before + 1
