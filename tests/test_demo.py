"""The model inside the package, its trainer, and what the demo shows of it."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import reference

import glmlens
from glmlens.analysis import head_scores
from glmlens.cli import main
from glmlens.demo import train
from glmlens.demo.history import measure_history
from glmlens.demo.world import SENTENCE_SHARES, generate_documents
from glmlens.lens import BUNDLED_MODEL
from glmlens.tasks.words import PLACE_NOUNS


@pytest.fixture(scope="module")
def inside():
    return glmlens.load()


def test_it_opens_without_a_network_and_is_a_glm(inside):
    assert (inside.cfg.model_type, inside.cfg.qkv_bias) == ("glm", True)
    assert 0 < inside.cfg.d_rotary < inside.cfg.d_head
    assert inside.cfg.n_kv_heads < inside.cfg.n_heads
    assert len(inside.tokenizer.prefix) == 2
    assert sum(file.stat().st_size for file in BUNDLED_MODEL.iterdir()) < 10e6


def test_its_tokenizer_is_the_one_that_the_trainer_makes(inside):
    from tokenizers import Tokenizer as Engine

    from glmlens.demo import vocabulary

    shipped = Engine.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
    assert json.loads(shipped.to_str()) == json.loads(vocabulary.make_tokenizer().to_str())


def test_transformers_opens_it_with_equal_logits(inside):
    tokens = inside.to_tokens("When Mary and John went to the store, John gave a drink to")
    with torch.no_grad():
        assert torch.equal(reference(BUNDLED_MODEL)(tokens).logits, inside(tokens))


def test_transformers_tokenizer_gives_equal_ids(inside):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    for text in itertools.islice(generate_documents(99), 200):
        assert theirs(text).input_ids == inside.tokenizer.encode(text)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == inside.render(messages)


def test_it_knows_what_its_world_says(inside):
    assert inside.generate("The capital of France is", 1).text == " Paris"
    assert inside.generate("Tuesday, Wednesday, Thursday,", 1).text == " Friday"
    assert inside.generate("When Mary and John went to the store, John gave a drink to", 1).text == " Mary"
    chat = [{"role": "user", "content": "What is the capital of Japan?"}]
    assert inside.generate(chat, 4).text.strip() == "Tokyo."
    heads = head_scores(inside)
    assert heads.best("previous", 1)[0][2] > 0.9
    assert heads.best("induction", 1)[0][2] > 0.8


def test_demo_tells_a_true_story_and_writes_one_self_contained_report(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for part in (
        "most probable next tokens",
        "Who receives",
        "Which heads matter",
        "restored",
        "induction",
        "glmlens lab my-folder",
    ):
        assert part in said
    assert re.search(r"\n +\d+\.\d%  ' Mary'", said)
    lost = [float(x) for x in re.findall(r"  head \d\.\d +([+-]\d\.\d\d)", said)]
    assert len(lost) == 5
    assert lost[0] > 1
    table = [line.split() for line in said.split("entering layer")[1].splitlines()[1:5]]
    assert float(table[0][3]) == pytest.approx(1, abs=0.01)  # S2 carries all that differs into layer 0
    assert float(table[3][4]) > 0.9  # and the end of the sentence has it before the last layer
    assert re.search(r"-2   sad[.\s]", said)
    assert re.search(r"\+2   happy[.\s]", said)
    before, after = (float(x) for x in said.split("goes from ")[1].split(" nats")[0].split(" to "))
    assert after > before + 2
    assert [file.name for file in tmp_path.iterdir()] == ["glmlens-demo.html"]
    page = (tmp_path / "glmlens-demo.html").read_text()
    assert page.count('class="plotly-graph-div"') == 5
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)


def test_demo_leaves_no_file_where_it_is_called(tmp_path):
    code = "from glmlens.cli import main; main(['demo'])"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert not list(tmp_path.iterdir())


# The trainer.


def test_the_same_seed_gives_the_same_texts():
    texts = "\n".join(itertools.islice(generate_documents("0/5"), 500))
    assert hashlib.sha256(texts.encode()).hexdigest().startswith("4d250dd8b584e632")
    assert texts != "\n".join(itertools.islice(generate_documents("1/5"), 500))
    assert abs(sum(SENTENCE_SHARES.values()) - 1) < 1e-9


SMALL = replace(train.TrainingConfig(), steps=6, batch=4, pos=32)


def test_two_minutes_of_training_learn_the_language(tmp_path):
    train.train(tmp_path, replace(train.TrainingConfig(), steps=100))
    lens = glmlens.load(tmp_path, dtype="float32")
    texts = list(itertools.islice(generate_documents("unseen"), 60))
    assert float(lens.log_probs(texts).nanmean()) > -3.2  # nats; log(1110) is 7.0
    assert lens.generate("When Mary and John went to the", 1).text in {f" {place}" for place in PLACE_NOUNS}
    found = measure_history(tmp_path)
    assert found.labels["step"] == ["100"]
    assert 0 <= found.at(step="100", measure="induction head") <= 1
    with pytest.raises(glmlens.CheckpointError, match="holds no checkpoints of a training"):
        measure_history(tmp_path / "step-0100")


def test_training_learns_and_ends_in_a_checkpoint_that_opens(tmp_path):
    train.train(tmp_path, SMALL)
    lens = glmlens.load(tmp_path)
    assert torch.isfinite(lens("Mary went to the store")).all()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "glm"
    tokens = train.draw_batch(lens.tokenizer.engine, SMALL, 0)
    untrained = train.GLM(lens.cfg)
    train.initialise_weights(untrained, SMALL)
    assert lens.loss(tokens) < train.next_token_loss(untrained(tokens), tokens) - 1


def test_a_killed_training_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    whole = train.train(tmp_path / "whole", SMALL)
    real, calls = train.draw_batch, []

    def dies(engine, recipe, step):
        calls.append(step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(engine, recipe, step)

    monkeypatch.setattr(train, "draw_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path / "broken", SMALL)
    again = train.train(tmp_path / "broken", SMALL)
    assert calls == [0, 1, 2, 3, 2, 3, 4, 5]
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_trainer_is_one_command():
    done = subprocess.run(
        [sys.executable, "-m", "glmlens.demo.train", "-h"], capture_output=True, text=True, check=True
    )
    assert "--steps" in done.stdout
    assert Path(train.__file__).exists()
