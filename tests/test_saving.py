"""A saved checkpoint is one that transformers opens, whole or not at all."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import HEADED, reference, rewrite_json, small_lens, write_checkpoint
from safetensors import safe_open
from test_classes import classifier
from test_formats import as_chatglm, exactly, nearly, runs, write_llama
from test_loading import TOKENS

import glmlens
from glmlens.loading import saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(6))
def test_transformers_opens_what_is_saved_with_equal_logits(tmp_path, seed, dtype):
    write_checkpoint(tmp_path / "a", seed, dtype)
    lens = glmlens.load(tmp_path / "a")
    assert lens.save(tmp_path / "b") == tmp_path / "b"
    runs(glmlens.load(tmp_path / "b"), reference(tmp_path / "b"), seed, exactly)
    given, own = reference(tmp_path / "b").state_dict(), reference(tmp_path / "a").state_dict()
    assert given.keys() == own.keys()
    assert all(torch.equal(given[name], own[name]) for name in own)
    assert glmlens.load(tmp_path / "b").cfg == lens.cfg


@pytest.mark.parametrize("kind", ["chatglm", "llama", "qwen2"])
def test_other_formats_are_saved_as_the_glm_that_they_are(tmp_path, kind):
    folder = tmp_path / "a"
    if kind == "chatglm":
        write_checkpoint(folder, 2, glm4=False, tie_word_embeddings=False)
        as_chatglm(folder, 500)
    else:
        write_llama(folder, kind, 1)
    lens = glmlens.load(folder)
    lens.save(tmp_path / "b")
    again = glmlens.load(tmp_path / "b")
    assert again.cfg.model_type == "glm"
    assert (again.cfg.rope_theta, again.cfg.d_rotary) == (lens.cfg.rope_theta, lens.cfg.d_rotary)
    for ours, saved in zip(lens.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, saved)
    runs(again, reference(tmp_path / "b"), 0, exactly)
    if kind != "chatglm":
        runs(again, reference(folder), 0, nearly)


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_class_heads_are_saved(tmp_path, kind):
    import transformers

    classifier(tmp_path / "a", kind, pad_token_id=0)
    lens = glmlens.load(tmp_path / "a")
    lens.save(tmp_path / "b")
    auto = getattr(transformers, f"AutoModelFor{kind}Classification")
    theirs = auto.from_pretrained(tmp_path / "b", attn_implementation="eager").eval()
    assert theirs.config.id2label == {0: "bad", 1: "so", 2: "good"}
    with torch.no_grad():
        assert torch.equal(glmlens.load(tmp_path / "b").classify(TOKENS), theirs(TOKENS).logits)
    assert glmlens.load(tmp_path / "b").cfg == lens.cfg


def test_a_model_without_a_head_is_saved(tmp_path):
    import transformers

    lens = small_lens(**HEADED["none"])
    lens.save(tmp_path / "b")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "b", attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(glmlens.load(tmp_path / "b")(TOKENS), theirs(TOKENS).last_hidden_state)


def test_the_tokenizer_and_the_stop_ids_go_with_it(tmp_path):
    import transformers

    lens = glmlens.load(dtype="float32")
    lens.save(tmp_path / "b")
    again, theirs = glmlens.load(tmp_path / "b"), transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    text = "John gave a drink to Mary."
    assert torch.equal(again(text), lens(text))
    assert again.tokenizer_hash == lens.tokenizer_hash
    assert (again.stop_ids, again.pad_id) == (lens.stop_ids, lens.pad_id)
    assert theirs(text, add_special_tokens=False).input_ids == lens.to_tokens(text, prefix=False)[0].tolist()
    chat = [{"role": "user", "content": "Hello"}]
    assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == lens.render(chat)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "b")
    assert tuple(generation.eos_token_id) == lens.stop_ids


def test_a_tokenizer_without_a_file_that_transformers_reads_is_written_as_one(tmp_path):
    import transformers

    inside = glmlens.load(dtype="float32")
    lens = glmlens.Lens(inside.model, inside.tokenizer)  # made by hand: there is no folder to copy from
    lens.save(tmp_path / "b")
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path / "b"), glmlens.load(tmp_path / "b")
    text = "John gave a drink to Mary."
    assert theirs(text).input_ids == lens.to_tokens(text)[0].tolist() == again.to_tokens(text)[0].tolist()
    chat = [{"role": "user", "content": "Hello"}]
    assert again.render(chat) == lens.render(chat)


def test_generation_settings_of_the_source_are_kept(tmp_path):
    write_checkpoint(tmp_path / "a", 2)
    rewrite_json(tmp_path / "a" / "generation_config.json", temperature=0.8, do_sample=True)
    glmlens.load(tmp_path / "a").save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["temperature"] == 0.8


def test_much_is_saved_in_shards(tmp_path):
    write_checkpoint(tmp_path / "a", 3)
    lens = glmlens.load(tmp_path / "a")
    limit = max(p.nbytes for p in lens.model.parameters()) + 1000
    lens.save(tmp_path / "b", shard_bytes=limit)
    shards = sorted((tmp_path / "b").glob("model-*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= limit  # noqa: SIM118
    runs(glmlens.load(tmp_path / "b"), reference(tmp_path / "b"), 3, nearly)
    assert all(
        torch.equal(ours, saved)
        for ours, saved in zip(lens.model.parameters(), glmlens.load(tmp_path / "b").model.parameters(), strict=True)
    )


def test_a_theta_that_was_passed_is_saved(tmp_path):
    write_checkpoint(tmp_path / "a", 2, max_position_embeddings=131072, rope_parameters={"rope_theta": 1e4})
    lens = glmlens.load(tmp_path / "a", rope_theta=5e6)
    lens.save(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(glmlens.load(tmp_path / "b")(TOKENS), lens(TOKENS))


def test_the_factor_of_rotated_channels_survives_rounding():
    cfg = small_lens().cfg
    for d_head in range(8, 200, 2):
        for d_rotary in range(2, d_head + 1, 2):
            factor = saving.find_rotary_factor(replace(cfg, d_head=d_head, d_rotary=d_rotary))
            assert int(d_head * factor) == d_rotary
            assert factor <= 1


def test_what_is_there_is_never_touched(tmp_path):
    lens = small_lens()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match="new or empty"):
            lens.save(tmp_path / name)
    assert (tmp_path / "full" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    lens.save(tmp_path / "empty")
    lens.save(tmp_path / "new" / "deep")
    assert torch.equal(glmlens.load(tmp_path / "empty")(TOKENS), glmlens.load(tmp_path / "new" / "deep")(TOKENS))


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    lens, write = small_lens(), saving.save_file

    def full(tensors, path, metadata):
        write(tensors, path, metadata)
        raise OSError("No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        lens.save(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no numbers to save"):
        glmlens.load(device="meta").save(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
