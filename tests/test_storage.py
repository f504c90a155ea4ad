"""Files that the package writes: whole or not at all, by one writer at a time, and noticed when they have changed."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import fuzz
import numpy as np
import pytest
import torch
from fuzz_saved import PROMPT, READERS, save_all, sweep
from safetensors.torch import save_file

import glmlens
from glmlens import file_io, patch
from glmlens import lab_command as lab
from glmlens.cli import main
from glmlens.demo import story
from glmlens.file_io import FileError
from glmlens.patch.sites import PatchError
from glmlens.recording.sparse_dictionaries import Dictionary


@pytest.fixture(scope="module")
def inside():
    return glmlens.load(dtype="float32")


@pytest.fixture(scope="module")
def saved(inside, tmp_path_factory):
    """What `fuzz_saved.save_all` writes, once."""
    root = tmp_path_factory.mktemp("saved")
    save_all(inside, root)
    return root


def writers(lens):
    """Everything that writes one file, by the name of its kind."""
    kv = lens.new_kv()
    lens(PROMPT, kv=kv)
    width = lens.cfg.d_model
    coder = Dictionary(*(torch.zeros(shape) for shape in ((width, 2), (2,), (2, width), (width,), (width,), (2,))))
    steering = patch.SteeringVector("resid_post", (1,), torch.ones(1, width), lens.model_hash)
    asked = [patch.Intervention(patch.Site("resid_post", layer=1), patch.Zero())]
    return {
        "cache": kv.save,
        "steering": steering.save,
        "dictionary": coder.save,
        "interventions": lambda path: patch.save_interventions(path, asked, lens),
        "page": lambda path: glmlens.save_html(path, "a page", ["text"]),
        "sweep": lambda path: sweep(lens, path),
    }


WRITERS = ["cache", "steering", "dictionary", "interventions", "page", "sweep"]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- whole or not at all ----


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_cannot_be_finished_leaves_the_one_before_and_nothing_else(inside, tmp_path, monkeypatch, kind):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    write = writers(inside)[kind]
    path = tmp_path / "file"
    write(path)
    before = contents(tmp_path)
    if kind == "sweep":  # in a finished one nothing is left to write
        path = tmp_path / "other"
    with monkeypatch.context() as during:
        during.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            write(path)
    assert contents(tmp_path) == before
    write(path)


def test_a_recording_and_a_checkpoint_that_cannot_be_finished_are_not_there(inside, tmp_path, monkeypatch):
    _, acts = inside.run_with_cache(PROMPT, "resid_post")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as during:
        during.setattr(os, "replace", full)
        for write in (acts.save, inside.save):
            with pytest.raises(OSError, match="No space left"):
                write(tmp_path / "folder")
    assert contents(tmp_path) == {}
    assert torch.equal(glmlens.load_activations(acts.save(tmp_path / "folder"))["resid_post"], acts["resid_post"])


@pytest.mark.parametrize("kind", WRITERS)
def test_a_device_a_folder_or_a_pipe_is_not_written_over(inside, tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    write = writers(inside)[kind]
    for name, what in (("pipe", "a pipe"), ("device", "a device"), ("", "a folder")):
        with pytest.raises(ValueError, match=f"expected a file, found {what}"):
            write(tmp_path / name)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_link_stays_a_link_and_permissions_stay_as_they_were(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    file_io.write_tensors(tmp_path / "link", {"a": torch.ones(2)})
    assert (tmp_path / "link").is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "far" / "file").stat().st_mode) == 0o666 & ~umask
    (tmp_path / "far" / "file").chmod(0o640)
    file_io.write_bytes(tmp_path / "link", b"text")
    assert stat.S_IMODE((tmp_path / "far" / "file").stat().st_mode) == 0o640
    assert (tmp_path / "far" / "file").read_bytes() == b"text"


def test_tensors_that_share_memory_are_saved_each_as_it_is(tmp_path):
    x = torch.arange(12.0).view(3, 4)
    file_io.write_tensors(tmp_path / "x", {"a": x, "b": x, "c": x.T, "d": x[1:], "e": torch.tensor(2), "f": x[:0]})
    file = file_io.TensorFile(tmp_path / "x")
    expected = {"a": x, "b": x, "c": x.T, "d": x[1:], "e": torch.tensor(2), "f": x[:0]}
    assert all(torch.equal(file.read(name), value) for name, value in expected.items())
    parts = {"W_enc": x, "b_enc": torch.ones(4), "W_dec": x.T.contiguous(), "b_dec": torch.ones(3)}
    save_file(parts, tmp_path / "sae")  # without b_in, which is then b_dec itself
    Dictionary.load(tmp_path / "sae").save(tmp_path / "again")
    assert torch.equal(Dictionary.load(tmp_path / "again").b_in, torch.ones(3))


def test_what_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(file_io, "MOST_VALUES", 50)
    monkeypatch.setattr(file_io, "MOST_HEADER", 500)
    with pytest.raises(FileError, match="save less in one file"):
        file_io.write_json(tmp_path / "a", {"x": list(range(60))})
    with pytest.raises(FileError, match="save less in one file"):
        file_io.write_tensors(tmp_path / "b", {f"tensor {i}": torch.ones(1) for i in range(9)})
    assert contents(tmp_path) == {}


# ---- `~` ----


def test_home_is_expanded_wherever_a_path_is_taken(inside, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(home))
    for kind, write in writers(inside).items():
        write(f"~/{kind}")
        assert (home / kind).is_file()
    glmlens.KVCache.load("~/cache")
    patch.SteeringVector.load("~/steering", inside)
    Dictionary.load("~/dictionary")
    assert len(patch.load_interventions("~/interventions", inside)) == 1
    assert inside.run_with_cache(PROMPT, "resid_post")[1].save("~/recording") == home / "recording"
    glmlens.load_activations("~/recording", inside)
    inside.harvest(["Mary"], "resid_post", "~/harvest")
    assert len(glmlens.load_harvest("~/harvest")) == len(inside.to_tokens("Mary")[0])
    assert inside.save("~/model") == home / "model"
    glmlens.load("~/model", device="meta")
    assert main(["lab", "~/lab", "--copy-only"]) == 0
    assert (home / "lab" / "tutorials" / "README.md").is_file()
    monkeypatch.setattr(story, "write_demo_report", lambda lens, prompt, out: out / "page.html")
    assert main(["demo", "--model", "~/model", "--out", "~/report"]) == 0
    assert (home / "report").is_dir()
    assert str(home / "lab") in capsys.readouterr().out
    assert list((tmp_path / "here").iterdir()) == []


def test_a_home_that_nobody_has_is_one_clear_error(tmp_path):
    for read in (glmlens.KVCache.load, glmlens.load_activations, glmlens.load_harvest, Dictionary.load):
        with pytest.raises(FileError, match=r"~nobody-of-this-name/x.*write the folder out"):
            read("~nobody-of-this-name/x")
    with pytest.raises(glmlens.CheckpointError, match="write the folder out"):
        glmlens.load("~nobody-of-this-name/x")


def test_a_report_that_can_go_nowhere_is_one_line_before_anything_is_computed(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "folder")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "give another folder" in said.err
    assert said.out == ""


# ---- as it was written ----


@pytest.mark.parametrize("kind", ["cache", "sweep", "steering", "dictionary", "recording", "harvest"])
def test_a_changed_byte_of_any_tensor_is_noticed(inside, saved, tmp_path, kind):
    folder = shutil.copytree(saved / kind, tmp_path / kind)
    path = sorted(folder.glob("*.safetensors"))[-1]
    READERS[kind](inside, shutil.copytree(folder, tmp_path / "again"))
    header, data = fuzz.split(path)
    for name in (name for name in header if name != "__metadata__"):
        begin, end = header[name]["data_offsets"]
        changed = bytearray(data)
        changed[(begin + end) // 2] ^= 1
        fuzz.join(path, header, bytes(changed))
        with pytest.raises(ValueError, match=f"{path.name}.* is not the|{path.name}: tensor .* is not as it was saved"):
            READERS[kind](inside, folder)


@pytest.mark.parametrize("kind", ["recording", "harvest"])
def test_a_file_of_another_recording_or_harvest_is_noticed(inside, tmp_path, kind):
    def write(folder, text):
        if kind == "recording":
            inside.run_with_cache(text, "resid_post")[1].save(folder)
        else:
            inside.harvest([text], "resid_post", folder)
        return next(folder.glob("*.safetensors"))

    mine, other = write(tmp_path / "a", "Mary"), write(tmp_path / "b", "John")
    assert mine.stat().st_size == other.stat().st_size
    os.replace(other, mine)
    with pytest.raises(FileError, match=f"{mine.name} is not the"):
        READERS[kind](inside, tmp_path / "a")
    mine.unlink()
    with pytest.raises((FileError, FileNotFoundError), match=f"{mine.name}: not found"):
        READERS[kind](inside, tmp_path / "a")


def test_a_harvest_does_not_go_on_after_a_shard_that_is_not_its_own(inside, tmp_path):
    prompts = ["Mary and John", "went to the store", "and gave a drink to"]
    inside.harvest(prompts, "resid_post", tmp_path, batch=1, shard_tokens=1)
    one, other, _ = sorted(tmp_path.glob("shard-*"))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    with pytest.raises(FileError, match=r"shard-00000\.safetensors is not the shard"):
        inside.harvest([*prompts, "more"], "resid_post", tmp_path)
    one.write_bytes(data)
    assert inside.harvest([*prompts, "more"], "resid_post", tmp_path).manifest["prompts"] == 4


def test_a_recording_cut_off_after_it_was_opened_is_an_error_and_no_crash(inside, tmp_path):
    inside.run_with_cache(PROMPT, "resid_post")[1].save(tmp_path)
    acts = glmlens.load_activations(tmp_path)
    held = acts["resid_post", 0]
    expected = held.clone()
    with (tmp_path / "activations.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(FileError, match="was changed after it was opened"):
        acts["resid_post", 1]
    assert torch.equal(held, expected)  # what was read is a copy


def test_a_recording_that_is_only_shown_is_not_read(inside, tmp_path, monkeypatch):
    _, acts = inside.run_with_cache(PROMPT, ["resid_post", "attn.pattern"])
    again = glmlens.load_activations(acts.save(tmp_path), inside)
    monkeypatch.setattr(file_io.TensorFile, "read", None)
    assert (repr(again), again.bytes) == (repr(acts), acts.bytes)


def test_a_cache_whose_tensors_do_not_fit_together_is_an_error(tmp_path):
    keys = torch.zeros(2, 1, 3, 2, 4)
    fitting = {"keys": keys, "values": keys.clone(), "positions": torch.arange(3)[None]}
    wrong = [("keys", keys[0]), ("keys", keys.long()), ("values", keys[:1]), ("values", keys.double())]
    wrong += [("positions", torch.tensor(3)), ("positions", torch.arange(2)[None]), ("positions", torch.ones(1, 3))]
    for name, x in (("calls", torch.zeros(1, 3).long()), *wrong):
        file_io.write_tensors(tmp_path / "kv", fitting | {name: x}, {"format": "glmlens.KVCache"})
        if name == "calls":
            assert glmlens.KVCache.load(tmp_path / "kv").length == 3
        else:
            with pytest.raises(FileError, match=r"keys: expected layer batch|: no KV cache"):
                glmlens.KVCache.load(tmp_path / "kv")


def test_cells_of_an_older_kind_are_one_clear_error(inside, tmp_path):
    np.savez(tmp_path / "cells.npz", key=np.array([print], dtype=object))
    with pytest.raises(PatchError, match=r"cells.npz: not a whole safetensors file.*: give another file, or remove it"):
        sweep(inside, tmp_path / "cells.npz")


# ---- one writer at a time ----

HARVESTING = """
import sys, time, glmlens
def prompts():
    yield "Mary"
    print("begun", flush=True)
    time.sleep(100)
    yield "John"
glmlens.load(dtype="float32").harvest(prompts(), "resid_post", sys.argv[1], batch=1, shard_tokens=1)
"""


def test_a_second_harvest_in_one_folder_is_told_who_harvests_there(inside, tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HARVESTING, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with child:
        child.stdout.readline()
        try:
            with pytest.raises(FileError, match=f"{tmp_path}: process {child.pid} on .* is writing a harvest there"):
                inside.harvest(["Mary", "John"], "resid_post", tmp_path)
            assert len(glmlens.load_harvest(tmp_path)) == len(inside.to_tokens("Mary")[0])  # reading is free
        finally:
            child.send_signal(signal.SIGKILL)
    assert (tmp_path / file_io.LOCK).exists()  # of a dead process, which holds nothing
    assert inside.harvest(["Mary", "John"], "resid_post", tmp_path).manifest["prompts"] == 2
    assert not (tmp_path / file_io.LOCK).exists()


def test_a_harvest_inside_a_harvest_of_one_folder_is_refused_and_the_first_goes_on(inside, tmp_path):
    def prompts():
        yield "Mary"
        with pytest.raises(FileError, match=f"process {os.getpid()}, this one, on .* is writing a harvest there"):
            inside.harvest(["John"], "resid_post", tmp_path)
        yield "John"

    assert inside.harvest(prompts(), "resid_post", tmp_path, batch=1).manifest["prompts"] == 2
    with pytest.raises(RuntimeError, match="prompts failed"):  # an error gives the folder back
        inside.harvest(failing(), "resid_post", tmp_path)
    assert inside.harvest(["Mary", "John", "more"], "resid_post", tmp_path).manifest["prompts"] == 3


def failing():
    yield from ("Mary", "John")
    raise RuntimeError("prompts failed")


def test_where_there_are_no_locks_another_writer_is_still_noticed(inside, tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    def prompts():
        yield "Mary"
        with pytest.warns(UserWarning, match="keeps no locks"):
            inside.harvest(["John"], "resid_post", tmp_path)
        yield "John"

    monkeypatch.setattr(file_io.fcntl, "flock", unsupported)
    with (
        pytest.warns(UserWarning, match=r"keeps no locks \(No locks available\): make sure"),
        pytest.raises(FileError, match=r"something else wrote harvest.json meanwhile"),
    ):
        inside.harvest(prompts(), "resid_post", tmp_path, batch=1)
    assert glmlens.load_harvest(tmp_path)["resid_post", 0].shape[0] == len(inside.to_tokens("John")[0])


def test_locks_of_many_processes_never_overlap(tmp_path):
    code = """
import sys, os, time
from pathlib import Path
from glmlens.file_io import FileError, lock_folder
folder, done = Path(sys.argv[1]), 0
while done < 60:
    try:
        with lock_folder(folder, "a test"):
            file = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)  # fails when somebody else is in
            os.close(file); os.unlink(folder / "inside"); done += 1
    except FileError:
        time.sleep(0.0005)
"""
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [child.wait(timeout=300) for child in children] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


# ---- guards ----


def test_reading_never_waits_for_a_pipe_that_takes_a_files_place(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    begin = time.perf_counter()
    for read in (file_io.read_json, file_io.TensorFile):
        with pytest.raises(FileError, match="expected a file, found a pipe"):
            read(tmp_path / "pipe")
    monkeypatch.setattr(file_io, "refuse_strange", lambda *args: None)  # it came after that had looked
    with pytest.raises(FileError, match="expected a file, found a pipe"):
        file_io.read_json(tmp_path / "pipe")
    assert time.perf_counter() - begin < 5


def test_lab_says_which_folder_it_cannot_use(tmp_path):
    os.mkfifo(tmp_path / lab.LAB_MANIFEST)
    with pytest.raises(lab.LabError, match="found a pipe; give another folder: glmlens lab FOLDER"):
        lab.copy_lab(tmp_path)
