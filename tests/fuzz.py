"""Breaks checkpoints, each by a number, and tells what loading them came to. Run by test_fuzz.py in a child process.

python tests/fuzz.py BASES FIRST LAST breaks a copy of one of the folders in BASES for every number and writes a line of
JSON before and after each, so that whoever reads knows which one ended the process.
"""

import copy
import faulthandler
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch

import glmlens
from glmlens.text.chat import TemplateError

OURS = (glmlens.CheckpointError, TemplateError)
SECONDS = 20  # a case that takes longer hangs
LIMIT = 4 << 30  # of address space beyond what the process has before: a brake, not the measure
ABSURD = [
    None, True, False, 0, -1, 1, 2, 3, 7, 1000, 2**31 - 1, 2**31, 2**63, 10**18, 10**4000, 1e18, 0.5, -0.5, 1e308,
    5e-324, float("nan"), float("inf"), "", "x", "4", "\ud800", "[" * 3000, [], [1], [[1]], ["x"], [None], {}, {"a": 1},
    [{}], [10**30], [-1], {"rope_type": 1}, {"content": None}, {"type": "yarn", "factor": 4},
]  # fmt: skip
FIELDS = [  # that a config.json may have besides those of the bases
    "torch_dtype", "dtype", "rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters",
    "quantization_config", "hidden_act",
    "architectures", "id2label", "num_labels", "attention_bias", "tie_word_embeddings", "layer_types", "eos_token_id",
    "rope_ratio", "sliding_window", "transformers_version",
]  # fmt: skip


# ---- JSON ----


def places(value, path=()):
    """The path of every value inside."""
    yield path
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from places(inside, (*path, key))
    elif isinstance(value, list):
        for i, inside in enumerate(value[:50]):
            yield from places(inside, (*path, i))


def changed(draw, value, path):
    """The value with what is at the path taken away, doubled or replaced."""
    if not path:
        return draw.choice(ABSURD)
    value = copy.deepcopy(value)
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    how = draw.random()
    if how < 0.25:
        del inside[path[-1]]
    elif how < 0.35 and isinstance(inside, list):
        inside.append(inside[path[-1]])
    else:
        inside[path[-1]] = draw.choice(ABSURD)
    return value


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def field_of_config(draw, folder):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for _ in range(draw.choice([1, 1, 2, 5])):
        name = draw.choice([*raw, *FIELDS])
        if draw.random() < 0.3:
            raw.pop(name, None)
        else:
            raw[name] = draw.choice(ABSURD)
    write(path, raw)


def inside_json(draw, folder):
    path = draw.choice(sorted(folder.glob("*.json")))
    raw = json.loads(path.read_text())
    for _ in range(draw.choice([1, 1, 3])):
        raw = changed(draw, raw, draw.choice(list(places(raw))))
    write(path, raw)


def no_json(draw, folder):
    others = [folder / "tokenizer_config.json"] if (folder / "config.json").exists() else []
    path = draw.choice([*sorted(folder.glob("*.json")), *others])
    data = draw.choice(
        [
            b"", b"{", b"null", b"[]", b"1" * 5000, b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"\xef\xbb\xbf{}",
            b"NaN", b'"\\ud800"', b"{}" + b" " * 1000, b"[" + b"{}," * 20_000_000 + b"{}]", b'{"a":1,"a":2}',
            b"\0" * 99,
        ]
    )  # fmt: skip
    path.write_bytes(data)


def no_file(draw, folder):
    """Something else where a file should be."""
    others = [folder / "chat_template.jinja", folder / "tokenizer.model"] if (folder / "config.json").exists() else []
    path = draw.choice([*sorted(folder.iterdir()), *others])
    path.unlink(missing_ok=True)
    kind = draw.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to("/dev/zero")
    elif kind == 4:
        with path.open("wb") as file:
            file.truncate(draw.choice([1 << 20, 1 << 28, 1 << 38]))  # a hole: costs no disk
    else:
        path.write_bytes(draw.randbytes(draw.choice([1, 100, 5000])))


# ---- safetensors ----


def weights(draw, folder):
    return draw.choice(sorted(folder.glob("*.safetensors")) or sorted(folder.iterdir()))


def split(path):
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def join(path, header, data, n=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if n is None else n) + text + data)


def cut(draw, folder):
    path = weights(draw, folder)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(draw.choice([0, 1, 7, 8, 9, draw.randrange(size), size - 1, size + 1, size + 4096]))


def flipped(draw, folder):
    path = draw.choice([weights(draw, folder), draw.choice(sorted(folder.iterdir()))])
    data = bytearray(path.read_bytes())
    end = draw.choice([len(data), min(len(data), 3000)])
    for _ in range(draw.choice([1, 1, 8, 200])):
        data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def enormous_header(draw, folder):
    path = weights(draw, folder)
    header, data = split(path)
    how = draw.randrange(4)
    if how == 0:
        n = draw.choice([2**60, 2**63, 2**64 - 1, 0, 1, len(data), 10**8 + 1, draw.randrange(1 << 40)])
        join(path, header, data, n)
    elif how == 1:  # many tensors
        with path.open("wb") as file:
            row = b'"t%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
            rows = draw.choice([10_000, 1_000_000])
            end = b'"z":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
            file.write(struct.pack("<Q", len(row % 0) * rows + 1 + len(end)) + b"{")
            for i in range(0, rows, 10_000):
                file.write(b"".join(row % j for j in range(i, i + 10_000)))
            file.write(end)
    elif how == 2:  # a hole of blanks or zeros that is said to be the header
        with path.open("wb") as file:
            n = draw.choice([10**8 - 1, 10**8 + 9, 1 << 33])
            file.write(struct.pack("<Q", n))
            file.truncate(8 + n)
    else:
        depth = draw.choice([100, 127, 200, 100_000])
        join(path, b'{"__metadata__":' + b"[" * depth + b"]" * depth + b"}", data)


def another_header(draw, folder):
    """A header that says something else about the same bytes."""
    path = weights(draw, folder)
    header, data = split(path)
    names = [name for name in header if name != "__metadata__"]
    one, other = draw.choice(names), draw.choice(names)
    how = draw.randrange(8)
    if how == 0:
        header[one]["data_offsets"] = header[other]["data_offsets"]  # overlapping
    elif how == 1:
        header[one], header[other] = header[other], header[one]
    elif how == 2:
        kinds = ["F16", "BF16", "F64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "I64", "X9", "", None, 4]
        header[one]["dtype"] = draw.choice(kinds)
    elif how == 3:
        shapes = [[], [0], [-1], [2**63], [2**32, 2**32], [1.5], ["a"], None, header[one]["shape"][::-1], [1] * 99]
        header[one]["shape"] = draw.choice(shapes)
    elif how == 4:
        begin, end = header[one]["data_offsets"]
        wrong = [[end, begin], [-1, end], [begin, 2**63], [begin], [], None, [begin, end + 4], [begin + 4, end + 4]]
        header[one]["data_offsets"] = draw.choice(wrong)
    elif how == 5:
        header[one + draw.choice(["", "x", "\n", "/../x", "\u202e"])] = header.pop(one)
    elif how == 6:
        header.pop(one)
    else:  # the same name twice
        text = json.dumps(header)[:-1] + "," + json.dumps({one: header[other]})[1:]
        return join(path, text.encode(), data)
    join(path, header, data)


def no_numbers(draw, folder):
    """Weights that are nan or infinite: one number, a row or a whole tensor."""
    path = weights(draw, folder)
    header, data = split(path)
    data, name = bytearray(data), draw.choice([name for name in header if name != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    bad = struct.pack("<f", draw.choice([float("nan"), float("inf"), -float("inf")]))
    size = {"F32": 4, "BF16": 2}[header[name]["dtype"]]
    first = draw.randrange(begin, end, size)
    count = draw.choice([1, min(10, (end - first) // size), (end - first) // size])
    data[first : first + count * size] = bad[-size:] * count
    join(path, header, bytes(data))


def index(draw, folder):
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        names = [name for name in split(folder / "model.safetensors")[0] if name != "__metadata__"]
        write(path, {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")})
        if draw.random() < 0.7:
            (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    raw = json.loads(path.read_text())
    shards = raw["weight_map"]
    one = draw.choice(sorted(shards))
    to = [
        path.name, "../" + shards[one], "/dev/zero", "/etc/passwd", "", ".", "..", "config.json", "nowhere.safetensors",
        "x\0.safetensors", "x" * 5000 + ".safetensors", None, 4, [], {}, draw.choice(sorted(shards.values())),
        "loop.safetensors", "folder.safetensors", "pipe.safetensors", "\ud800.safetensors",
    ]  # fmt: skip
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    how = draw.randrange(5)
    if how == 0:
        shards.pop(one)
    elif how == 1:
        shards["another"] = shards[one]
    elif how == 2:
        raw["weight_map"] = draw.choice([dict.fromkeys(shards, draw.choice(to)), *ABSURD])
    else:
        shards[one] = draw.choice(to)
    write(path, raw)


def ranks(draw, folder):
    """A tokenizer.model in place of tokenizer.json: lines of a token in base64 and its rank."""
    import base64

    (folder / "tokenizer.json").unlink(missing_ok=True)
    lines = [base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)]
    lines += [base64.b64encode(b"ab" * 2**i) + b" %d" % (256 + i) for i in range(4)]
    strange = [
        b"", b"YQ==", b"YQ== x", b"YQ== -1", b"YQ== 99999999999999999999", b"YQ== 1", b"!!! 5", b"YWI= 7 8", b" 4",
        base64.b64encode(b"ab" * 200_000) + b" 300", b"YWJj 1000000",
    ]  # fmt: skip
    for _ in range(draw.randrange(4)):
        lines[draw.randrange(len(lines))] = draw.choice(strange)
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines))
    if draw.random() < 0.5:
        table = {str(260 + i): {"content": f"<{i}>"} for i in range(3)}
        write(folder / "tokenizer_config.json", {"added_tokens_decoder": table})
    if draw.random() < 0.5:
        path = folder / "tokenizer_config.json"
        raw = json.loads(path.read_text()) if path.exists() else {"added_tokens_decoder": {"260": {"content": "<a>"}}}
        write(path, changed(draw, raw, draw.choice(list(places(raw)))))


WAYS = [
    field_of_config, field_of_config, inside_json, inside_json, no_json, no_file, cut, flipped, flipped,
    enormous_header, another_header, another_header, no_numbers, index, index, ranks,
]  # fmt: skip


# ---- what loading comes to ----


def run(folder):
    """Load and run: "ran", or the sentence of one of our errors; anything else is for the caller to hear of."""
    lens = glmlens.load(folder)
    ids = [i for i in (2, 5, 3, 2, 7) if i < lens.cfg.d_vocab] or [0]
    logits = lens(ids)
    lens.generate(ids, 2)
    if lens.tokenizer is not None:
        try:
            lens.to_labels("a b", width=9)
            lens.to_string(torch.tensor(ids))
        except ValueError as e:  # the vocabularies of tokenizer and model need not agree
            if "token ids run from" not in str(e) and "has no tokens" not in str(e):
                raise
    if not logits.isfinite().all():
        assert all(p.isfinite().all() for p in lens.model.parameters()), "logits that are no numbers, of such weights"
    return "ran"


def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


def case(seed, bases, scratch, run, ways, ours):
    draw = random.Random(seed)
    base = draw.choice(bases)
    way = draw.choice(ways(base))
    folder = scratch / base.name
    shutil.copytree(base, folder)
    way(draw, folder)
    yield {"seed": seed, "way": way.__name__, "base": base.name}
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before, begin = memory("VmRSS"), time.perf_counter()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        outcome = run(folder)
    except BaseException as e:
        outcome = f"{'' if ours(e, folder) else 'NOT OURS: '}{type(e).__name__}: {e}"
    faulthandler.cancel_dump_traceback_later()
    used = memory("VmHWM") - before
    yield {"outcome": outcome.encode("ascii", "backslashreplace").decode()[:600], "bytes": used,
           "seconds": round(time.perf_counter() - begin, 3)}  # fmt: skip


def is_ours(e, folder):
    return isinstance(e, OURS)


def main(run=run, ways=lambda base: WAYS, ours=is_ours):
    bases, seeds = sorted(Path(sys.argv[1]).iterdir()), range(int(sys.argv[2]), int(sys.argv[3]))
    for base in bases:
        with tempfile.TemporaryDirectory() as scratch:
            run(shutil.copytree(base, Path(scratch) / base.name))  # what a first run costs is no case's
    most = memory("VmSize") + LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for seed in seeds:
        with tempfile.TemporaryDirectory() as scratch:
            for line in case(seed, bases, Path(scratch), run, ways, ours):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
