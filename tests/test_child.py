"""Programs and files of strangers in processes of their own: kept while they behave, ended when they do not."""

import base64
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_text import tokenizer as byte_level

import glmlens
from glmlens.text import chat
from glmlens.text import sandbox_process as child
from glmlens.text import tokenizer as tokenizers
from glmlens.text.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{{ word }}{# not a known one #}"
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def said(content, template=TEMPLATE, **variables):
    return chat.render_chat(template, [{"role": "user", "content": content}], **variables)


def test_a_template_costs_less_than_5_ms_once_it_is_warm():
    said("warm")
    taken = []
    for i in range(50):
        begin = time.perf_counter()
        assert said(str(i)) == f"<|user|>\n{i}"
        taken.append(time.perf_counter() - begin)
    assert sorted(taken)[len(taken) // 4] < 0.005  # three of four may have waited for others on this machine


def process_of(template):
    from hashlib import sha256

    return chat.CHILDREN[sha256(template.encode()).hexdigest()]._process


def test_a_template_that_misbehaves_is_ended_and_then_started_again():
    template = (
        "{% if word %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}ok"
    )
    assert said("x", template) == "ok"
    first = process_of(template)
    assert said("x", template) == "ok"
    assert process_of(template) is first
    with pytest.raises(chat.TemplateError, match="did not come to an end within 1 s"):
        said("x", template, word=1)
    assert first.returncode is not None
    assert said("x", template) == "ok"
    process_of(template).kill()  # from outside, while it waits
    process_of(template).wait()
    assert said("x", template) == "ok"


def test_every_template_has_a_process_of_its_own_and_few_are_kept():
    for i in range(chat.MOST_CHILDREN + 3):
        assert said("x", f"{i}") == str(i)
    assert len(chat.CHILDREN) <= chat.MOST_CHILDREN
    one, other = list(chat.CHILDREN.values())[-2:]
    assert one._process.pid != other._process.pid


def test_after_an_interrupt_the_next_answer_is_that_of_the_next_job(monkeypatch):
    said("warm")
    exchange = child.exchange

    def interrupted(process, line, most):
        exchange(process, line, 1)  # the answer begins, and is not read to its end
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(child, "exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            said("first")
    assert said("second") == "<|user|>\nsecond"


def test_threads_get_each_their_own_answer():
    found = {}

    def ask(name):
        for i in range(20):
            found.setdefault(name, []).append(said(f"{name} {i}"))

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [f"<|user|>\n{name} {i}" for i in range(20)] for name in range(4)}


SCRIPT = """
import os, signal, sys
from glmlens.text import chat
TEMPLATE = {template!r}
def said(content):
    return chat.render_chat(TEMPLATE, [{{"role": "user", "content": content}}])
assert said("a").endswith("a")
[kept] = chat.CHILDREN.values()
print(kept._process.pid, flush=True)
assert os.getpgid(kept._process.pid) != os.getpgid(0)  # an interrupt of a notebook's kernel goes to its group
{then}
"""


def run_script(then):
    """What a process prints that renders a template and then does this; the numbers of the processes it names."""
    code = SCRIPT.format(template=TEMPLATE, then=then)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done, [int(line) for line in done.stdout.split()]


def ended(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


@posix
@pytest.mark.parametrize("then", ["", "sys.exit(3)", "raise ValueError", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_nothing_is_left_running_however_the_process_ends(then):
    _, pids = run_script(then)
    assert len(pids) == 1
    assert ended(pids[0])


FORKED = """
forked = os.fork()
if not forked:
    ok = all(said(f"forked {i}").endswith(f"forked {i}") for i in range(20))
    assert kept._process.pid != int(os.environ.get("KEPT", -1))
    print(kept._process.pid, flush=True)
    os._exit(0 if ok else 1)
ok = all(said(f"here {i}").endswith(f"here {i}") for i in range(20))
assert ok and os.waitpid(forked, 0)[1] == 0
assert kept._process.poll() is None
"""


@posix
def test_a_forked_process_has_children_of_its_own():
    done, pids = run_script(FORKED)
    assert done.returncode == 0, done.stderr
    assert len(set(pids)) == 2
    assert all(ended(pid) for pid in pids)


def test_where_no_process_can_be_started_the_error_says_so(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(chat.TemplateError, match="no process could be started: /no/such/python"):
        said("x", "{{ 'one that has no process yet' }}")


# Tokenizers.


def hostile(kind):
    base = json.loads(byte_level().to_str())
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    long = {"type": "Prepend", "prepend": "b" * 1000}
    bad = {
        "it takes all memory": {"normalizer": {"type": "Sequence", "normalizers": [grow] * 6}},
        "it hangs": {"normalizer": {"type": "Sequence", "normalizers": [long] * 1000}},
        "it ends the process": {
            "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 64).decode()}
        },
        "it panics when read": {"model": base["model"] | {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}},
        "it panics when used": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        "it panics behind a text": {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "none", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    }
    return json.dumps(base | bad[kind])


@pytest.mark.parametrize("kind", ["takes all memory", "hangs", "ends the process", "panics when read",
                                  "panics when used", "panics behind a text"])  # fmt: skip
def test_a_tokenizer_that_harms_the_process_is_an_error_of_its_file(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "SECONDS", 5.0)
    (tmp_path / "tokenizer.json").write_text(hostile(f"it {kind}"))
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json that the tokenizers library can read"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_without_an_unknown_token_is_read(tmp_path):
    base = json.loads(byte_level().to_str())
    words = {"type": "WordLevel", "unk_token": "none", "vocab": {"Mary": 0, "none": 1}}
    base |= {"model": words, "added_tokens": [], "post_processor": None, "decoder": None}
    base["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(base | {"model": words | {"vocab": {"Mary": 0}}}))
    text = Tokenizer.from_folder(tmp_path)
    assert text.encode("Mary") == [0]
    assert text.prefix == text.suffix == ()


def test_a_panic_of_the_library_never_escapes():
    text = Tokenizer(byte_level())

    class PanicException(BaseException):
        pass

    class Broken:
        def __getattr__(self, name):
            def panic(*_, **__):
                raise PanicException("index out of bounds")

            return panic

    text.engine = Broken()
    calls = [lambda: text.encode("a"), lambda: text.decode([0]), lambda: text.decode_each([0]),
             lambda: text.encode_single("a"), lambda: text.list_words(), lambda: text.label(0),
             lambda: text.roles([0]), lambda: text.fingerprint(),
             lambda: text.encode_with_offsets("a"), lambda: text.encode_continuation("a"),
             lambda: text.drop_unfinished_bytes([0])]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="the tokenizer of this checkpoint broke down"):
            call()


RANKS = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


@pytest.fixture
def model_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tokenizer.model").write_bytes(RANKS + base64.b64encode(b" Mary") + b" 256\n")
    return tmp_path


def kept(folder):
    return sorted((folder / "cache").rglob("*.json"))


@pytest.mark.parametrize("harm", ["cut", "empty", "no JSON", "another", "no text", "no permission", "a folder"])
def test_a_kept_tokenizer_that_was_harmed_is_made_again(model_file, harm):
    first = Tokenizer.from_folder(model_file)
    assert first.prefix == (259, 261)
    [path] = kept(model_file)
    good = path.read_bytes()
    if harm == "no permission":
        path.chmod(0)
    elif harm == "a folder":
        path.unlink()
        path.mkdir()
    else:
        other = good.replace(b'"a"', b'"\xc3\xa9"', 1)
        bad = {"cut": good[:-9], "empty": b"", "no JSON": b"{}", "another": other, "no text": b"\xff"}
        path.write_bytes(bad[harm])
    again = Tokenizer.from_folder(model_file)
    assert again.engine.to_str() == first.engine.to_str()
    if harm != "a folder":
        assert [p.read_bytes() for p in kept(model_file)] == [good]
    assert not list((model_file / "cache").rglob("*.new"))


def test_what_is_kept_is_used(model_file, monkeypatch):
    first = Tokenizer.from_folder(model_file)
    monkeypatch.setattr(tokenizers, "run_in_child", lambda job: pytest.fail("it was made again"))
    assert Tokenizer.from_folder(model_file).engine.to_str() == first.engine.to_str()


@pytest.mark.parametrize("home", ["none", "a file", "not writable"])
def test_without_a_place_to_keep_it_a_tokenizer_is_made_each_time(model_file, home, monkeypatch):
    cache = model_file / "cache"
    if home == "none":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    elif home == "a file":
        cache.write_text("")
    else:
        cache.mkdir(mode=0o500)
    for _ in range(2):
        assert Tokenizer.from_folder(model_file).encode_single(" Mary") == 256


def test_a_tokenizer_model_that_cannot_be_converted_is_an_error_of_its_file(model_file):
    (model_file / "tokenizer.model").write_bytes(b"\x0a\x05sentencepiece\xff")
    with pytest.raises(ValueError, match=r"tokenizer.model: expected lines of 'base64 rank'"):
        Tokenizer.from_folder(model_file)


def test_a_checkpoint_with_a_harmful_tokenizer_ends_in_a_checkpoint_error(checkpoint_folder):
    (checkpoint_folder / "tokenizer.json").write_text(hostile("it ends the process"))
    with pytest.raises(glmlens.CheckpointError, match=r"tokenizer.json"):
        glmlens.load(checkpoint_folder)
