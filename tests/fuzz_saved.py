"""Breaks saved files of every kind, each by a number, and tells what reading them came to. Run by test_fuzz.py.

python tests/fuzz_saved.py BASES FIRST LAST: as fuzz.py does with checkpoints. The folders in BASES are what `save_all`
wrote: a cache, a sweep's cells, steering vectors, a dictionary, interventions, a recording, a harvest.
"""

import contextlib
import json
import os

import fuzz
import torch

import glmlens
from glmlens import patch
from glmlens.file_io import FileError
from glmlens.hook_points import HookError
from glmlens.recording.sparse_dictionaries import Dictionary

PROMPT, OTHER = "When Mary and John went to the store", "When John and Mary went to the store"
PLACES = {"over": ("layer",), "metric": (5, 6), "direction": "denoise", "progress": False, "normalise": False}


def sweep(lens, path):
    clean, corrupt = (lens.to_tokens(text) for text in ("Mary and John", "John and Mary"))
    return patch.sweep(lens, clean, corrupt, patch.Site("resid_pre"), checkpoint=path, **PLACES)


def save_all(lens, root):
    """Write a small one of every kind, each into a folder of its own."""
    for name in ("cache", "sweep", "steering", "dictionary", "interventions"):
        (root / name).mkdir()
    lens.generate(PROMPT, 2).kv.save(root / "cache" / "kv.safetensors")
    sweep(lens, root / "sweep" / "cells.safetensors")
    steering = patch.fit_steering(lens, ["Mary"], ["John"])
    steering.save(root / "steering" / "vectors.safetensors")
    model = lens.cfg.d_model
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=draw) for shape in ((model, 9), (9,), (9, model), (model,), (model,), (9,))]
    Dictionary(*parts).save(root / "dictionary" / "sae.safetensors")
    changes = [patch.Zero(), patch.Scale(2), patch.Noise(3, 4), patch.Mean.of_prompts(lens, ["Mary", "a store"])]
    changes += [patch.Put(1.5), patch.Add(tuple(steering[1].tolist())), patch.Swap.of_prompt(lens, OTHER)]
    asked = [patch.Intervention(patch.Site("resid_post", layer=1, pos=(3, 4)), change) for change in changes]
    patch.save_interventions(root / "interventions" / "these.json", asked, lens)
    lens.run_with_cache(PROMPT, ["resid_post", "attn.pattern", "kv.k"])[1].save(root / "recording")
    lens.harvest([PROMPT, "Mary", "John gave", "a drink"], "resid_post", root / "harvest", batch=1, shard_tokens=8)


# ---- what reading comes to ----


def is_ours(e, folder):
    """Whether an error is one of the package's, and names the file unless that could be read and then not be used."""
    used = isinstance(e, (patch.PatchError, HookError)) or str(e).startswith("this KV cache has")
    return used or ((isinstance(e, (FileError, FileNotFoundError)) or type(e) is ValueError) and str(folder) in str(e))


def read_cache(lens, folder):
    kv = glmlens.KVCache.load(folder / "kv.safetensors")
    repr(kv)
    lens.generate(" is", 1, kv=kv)


def read_sweep(lens, folder):
    sweep(lens, folder / "cells.safetensors")


def read_steering(lens, folder):
    steering = patch.SteeringVector.load(folder / "vectors.safetensors", lens, other_model=True)
    patch.run_with_interventions(lens, PROMPT, steering.interventions())


def read_dictionary(lens, folder):
    coder = Dictionary.load(folder / "sae.safetensors")
    lens.with_dictionary("blocks.1.resid_post", coder)(PROMPT)


def read_interventions(lens, folder):
    repr(asked := patch.load_interventions(folder / "these.json", lens, other_model=True))
    for one in asked:
        patch.run_with_interventions(lens, PROMPT, one)


def read_recording(lens, folder):
    for given in (lens, None):
        acts = glmlens.load_activations(folder, given)
        for name in acts:
            if given is not None or name in acts.stored:
                acts[name]
    acts = glmlens.load_activations(folder, lens)
    repr(acts), acts.labels, acts.at(1), acts.row(0)


def read_harvest(lens, folder):
    found = glmlens.load_harvest(folder)
    repr(found), found.tokens, found.prompts, found.positions
    for name in found.names:
        found[name]
    lens.harvest([PROMPT, "Mary", "John gave", "a drink", "again"], "resid_post", folder, batch=1, shard_tokens=8)


READERS = {name.removeprefix("read_"): reader for name, reader in globals().items() if name.startswith("read_")}


# ---- ways to break a folder ----


def paths_out(draw, folder):
    """A manifest that names files elsewhere."""
    path = draw.choice(sorted(folder.glob("*.json")))
    raw = json.loads(path.read_text())
    elsewhere = [
        "/etc/passwd", "../../x.safetensors", "/dev/zero", "", ".", "\0", "x" * 5000, None, 4, [],
        "shard-00001.safetensors", "pipe.safetensors",
    ]  # fmt: skip
    os.mkfifo(folder / "pipe.safetensors")
    for shard in raw.get("shards", []):
        shard["file"] = draw.choice(elsewhere)
    raw["names"] = draw.choice([[draw.choice(elsewhere)], raw.get("names", [])])
    fuzz.write(path, raw)


def swapped(draw, folder):
    """Two of its tensor files in each other's place, or one in the place of both."""
    one, other = draw.sample(sorted(folder.glob("*.safetensors")), 2)
    data = one.read_bytes()
    if draw.random() < 0.5:
        one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def long_json(draw, folder):
    """A JSON file that would take much memory."""
    path = draw.choice(sorted(folder.glob("*.json")))
    units = [b"[],", b'{"a":{}},', b'"\xf0\x9f\x90\x88",', b"1,", b'{"x":1,"y":2},']
    unit = draw.choice(units)
    size = draw.choice([10**6, 15 * 10**6, 10**8])
    path.write_bytes(b'{"interventions":[' + unit * (size // len(unit)) + b"1]}")


def another_text(draw, folder):
    """Metadata that is no JSON, or says something else."""
    path = fuzz.weights(draw, folder)
    header, data = fuzz.split(path)
    said = header.setdefault("__metadata__", {})
    name = draw.choice(sorted(said) or ["format"])
    texts = ["", "x", "{}", "[" * 100_000, "null", "\ud800", '{"point": 3}', "0" * 10**6, "glmlens.KVCache"]
    if draw.random() < 0.3:
        said.pop(name, None)
    else:
        said[name] = draw.choice(texts)
    if name == "about" and draw.random() < 0.7:
        about = {"point": "resid_post", "layers": [0, 1, 2, 3], "model": "m", "about": "a"}
        said[name] = json.dumps(fuzz.changed(draw, about, draw.choice(list(fuzz.places(about)))))
    fuzz.join(path, header, data)


def ways(folder):
    """The ways to break what is in this folder."""
    tensors, texts = (len(list(folder.glob(f"*.{ext}"))) for ext in ("safetensors", "json"))
    found = [fuzz.no_file, fuzz.flipped]
    if tensors:
        found += [fuzz.cut, fuzz.enormous_header, fuzz.another_header, fuzz.another_header, another_text]
    if texts:
        found += [fuzz.inside_json, fuzz.inside_json, fuzz.inside_json, fuzz.no_json, long_json]
    if tensors and texts:
        found += [paths_out]
    return found + ([swapped] if tensors > 1 else [])


def main():
    lens = glmlens.load(dtype="float32")

    def run(folder):
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # the bar of a harvest
            READERS[folder.name](lens, folder)
        return "ran"

    fuzz.main(run, ways, is_ours)


if __name__ == "__main__":
    main()
