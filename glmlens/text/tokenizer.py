"""Convert text to token ids and back, with the tokenizer's prefix (`[gMASK]<sop>`) before a text exactly once."""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine

from glmlens.text.sandbox_process import Child, ChildError

PREFIX_TOKENS = ("[gMASK]", "<sop>")
GLM4_SPECIAL_TOKENS = [
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
]  # fmt: skip
GLM4_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
MAX_VOCABULARY = 1 << 24
MAX_TOKEN_BYTES = 1024  # finding the merges of a token costs their square
MAX_JSON_VALUES = 2_000_000  # GLM-4 has 800,000; to read one that is no tokenizer costs 100 bytes each
MOST_JSON = 1 << 28  # bytes of a converted one
SECONDS = 30.0  # for a child to read or convert a tokenizer; GLM-4's takes 5 s and 1 GB
MOST_MEMORY = 2 << 30
VETTED = {
    "d114fbae8ca1babcb6a32192910b2cd0cad387e466e0c327c2600fe8ff56b291"
}  # by sha256: the demo model's, and what this process has tried in a child
PROBES = ("a", "0", ".", "Mary went to the store in 1785, and", "\n \t\u4f60\u597d\U0001f600", "a" * 1000)
STEMS = ("a", "\n", ".", "0", "(", "\u4f60")  # texts that another may continue
ROLES = ("system", "user", "assistant", "observation")  # <|user|> and the others begin a turn in every GLM chat
VISIBLE_CHARACTERS = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}


@contextmanager
def no_panic(where: str) -> Iterator[None]:
    """Raise ValueError for a panic of the tokenizers library, which is no Exception."""
    try:
        yield
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer of this checkpoint broke down {where}: {e}") from e


class Tokenizer:
    """A checkpoint's tokenizer and its chat template, if it has one.

    `prefix` are the ids that its post-processor puts before every text, such as `[gMASK]<sop>` or a BOS, and `suffix`
    those after it, such as an EOS. As in transformers, they come from tokenizer.json alone (not from add_bos_token or
    add_eos_token in tokenizer_config.json). Either may be empty.
    """

    def __init__(self, engine: Engine, chat_template: str | None = None, named_tokens: dict[str, str] | None = None):
        engine.no_padding()
        engine.no_truncation()
        self.engine, self.chat_template, self.named_tokens = engine, chat_template, named_tokens or {}
        self.special_ids = frozenset(engine.get_added_tokens_decoder())
        self._words: list[str] | None = None
        self.prefix, self.suffix = added_ids(engine)
        self._stem, self._stem_text = self._find_stem()
        self.adds_space = "".join(self.decode_each(self.encode_or_empty("a"))) == " a"

    @staticmethod
    def from_folder(folder: Path) -> "Tokenizer | None":
        """Return the tokenizer in `folder`, from tokenizer.json or a tiktoken-style tokenizer.model, or None."""
        stated = folder / "tokenizer_config.json"
        try:
            config = json.loads(stated.read_text(encoding="utf-8")) if stated.exists() else {}
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{stated}: not readable as JSON: {e}") from e
        if not isinstance(config, dict):
            raise ValueError(f"{stated}: expected an object, found {type(config).__name__}")
        spelt = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        texts = {name: t.get("content") if isinstance(t, dict) else t for name, t in spelt.items()}
        named = {name: text for name, text in texts.items() if isinstance(text, str)}
        path, ranks = folder / "tokenizer.json", folder / "tokenizer.model"
        if path.exists():
            engine = read_tokenizer_json(path)
        elif ranks.exists():
            engine = convert_tiktoken(ranks, read_special_tokens(config, stated))
        else:
            return None
        return Tokenizer(engine, read_chat_template(folder, config), named)

    def encode(self, text: str, prefix: bool = True, suffix: bool | None = None) -> list[int]:
        """Return the ids of `text` with prefix and suffix exactly once each, also if the text has them already.

        Without `prefix` there is neither. `suffix=False` leaves out the suffix alone, for a text to be continued.
        """
        ids = self.encode_raw(text).ids
        before = self.prefix if prefix and tuple(ids[: len(self.prefix)]) != self.prefix else ()
        behind = self.suffix if (prefix if suffix is None else suffix) else ()
        if behind and tuple(ids[-len(behind) :]) == behind:
            behind = ()
        return [*before, *ids, *behind]

    def encode_raw(self, text: str) -> Any:
        """Return the engine's encoding of `text`; ValueError if it gives up, as on a runaway regular expression."""
        with no_panic(f"at {text!r:.80}"):
            return self.engine.encode(text, add_special_tokens=False)

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of `text` where it continues another text.

        A SentencePiece-like tokenizer adds a space before every text. There is none between a text and its
        continuation: " Mary" is the token with a space, "Mary" the one without.
        """
        plain = self.encode_raw(text).ids
        if not self.adds_space or not text:
            return plain
        continued = None
        # Encode after a short text and remove its ids, preferring one after which the ids spell exactly `text`.
        for stem in STEMS:
            before, ids = self.encode_raw(stem).ids, self.encode_raw(stem + text).ids
            if ids[: len(before)] == before:
                continued = continued or ids[len(before) :]
                if "".join(self.decode_each(ids[len(before) :])) == text:
                    return ids[len(before) :]
        return continued or plain

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `text` without suffix, and the characters [start, end) of each; (0, 0) in a prefix."""
        encoded = self.encode_raw(text)
        added = len(self.encode(text, suffix=False)) - len(encoded.ids)
        return [*self.prefix[:added], *encoded.ids], [(0, 0)] * added + encoded.offsets

    def strip_prefix(self, ids: list[int]) -> list[int]:
        """Return ids without the prefix at their beginning, if they have it."""
        return ids[len(self.prefix) :] if tuple(ids[: len(self.prefix)]) == self.prefix else ids

    def decode(self, ids: Sequence[int], special: bool = True) -> str:
        """Return the text of `ids` at the beginning of a text, with or without special tokens."""
        return self._decode(list(ids), special)

    def decode_continuation(self, ids: Sequence[int], special: bool = True) -> str:
        """Return the text of `ids` where they continue another text, with the leading space of the first."""
        if not self._stem_text:
            return self._decode(list(ids), special)
        return self._decode([*self._stem, *ids], special)[len(self._stem_text) :]

    @no_panic("at its vocabulary")
    def drop_unfinished_bytes(self, ids: Sequence[int]) -> Sequence[int]:
        """Return `ids` without byte tokens at their end: a later byte may change the character that they spell."""
        end = len(ids)
        while end and BYTE_TOKEN.fullmatch(self.engine.id_to_token(ids[end - 1]) or ""):
            end -= 1
        return ids[:end]

    def encode_or_empty(self, text: str) -> list[int]:
        """Return the ids of a text; none where this tokenizer cannot encode it, for want of an unknown token."""
        try:
            return self.encode_raw(text).ids
        except Exception:
            return []

    def _find_stem(self) -> tuple[list[int], str]:
        """A token to decode others behind, and its text; neither where texts are just those of their tokens.

        Decoders of SentencePiece take a space from the first token. With another token before it, it keeps the space.
        """
        probed = dict.fromkeys(i for probe in PROBES for i in self.encode_or_empty(probe))
        for stem in probed:
            text = self._decode([stem], special=False)
            if text.strip() and "\ufffd" not in text:
                alike = all(self._decode([stem, i]) == text + self._decode([i]) for i in probed)
                return ([], "") if alike else ([stem], text)
        return [], ""

    def _decode(self, ids: list[int], special: bool = True) -> str:
        if ids and min(ids) < 0:
            raise ValueError(f"{min(ids)} is no token id: padding and unknown tokens of a cache have no text")
        with no_panic(f"at the ids {ids!r:.80}"):
            return self.engine.decode(ids, skip_special_tokens=not special)

    def encode_single(self, text: str) -> int:
        """Return the one id of `text`, without prefix; ValueError showing the tokens if it is not one."""
        ids = self.encode_continuation(text)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, not one: {self.decode_each(ids)}")
        return ids[0]

    @no_panic("at its vocabulary")
    def list_word_ids(self) -> list[int]:
        """Return the ids whose text, in the middle of others, is a space and a word."""
        ids = sorted(i for i in self.engine.get_vocab().values() if i not in self.special_ids)
        texts = self.engine.decode_batch([[*self._stem, i] for i in ids])
        texts = [text[len(self._stem_text) :] for text in texts]
        return [
            i for i, text in zip(ids, texts, strict=True) if text[:1] == " " and len(text) > 2 and text[1:].isalpha()
        ]

    def list_words(self) -> list[str]:
        """Return the texts of `list_word_ids`, each with its space."""
        if self._words is None:
            self._words = self.decode_each(self.list_word_ids())
        return self._words

    @no_panic("at its vocabulary")
    def fingerprint(self) -> str:
        """Return 12 hex digits that identify this tokenizer."""
        return hashlib.sha256(self.engine.to_str().encode()).hexdigest()[:12]

    def decode_each(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each id by itself, as in the middle of a text: with its leading space."""
        return [self.decode_continuation([i]) for i in ids]

    def labels(self, ids: Sequence[int], width: int | None = None) -> list[str]:
        """Return a readable label for each id: visible spaces and newlines, bytes of half a character in hex.

        The label of an id without a token is its number. With `width`, longer labels end in an ellipsis. Nothing is
        escaped: whoever displays the labels does that.
        """
        labels = [self.label(i) for i in ids]
        return labels if width is None else [t if len(t) <= width else t[: width - 1] + "…" for t in labels]

    @no_panic("at its vocabulary")
    def roles(self, ids: Sequence[int]) -> list[str]:
        """Return the role of the turn of each id: that of the last role token so far; "" before any.

        A role token is the first token of its turn. One written inside a message begins a turn too, as for the model.
        """
        begins = {self.engine.token_to_id(f"<|{role}|>"): role for role in ROLES}
        if not begins.keys() & self.special_ids:
            raise ValueError(f"this vocabulary has none of the role tokens {', '.join(f'<|{r}|>' for r in ROLES)}")
        found = [""]
        for i in ids:
            found.append(begins.get(i, found[-1]))
        return found[1:]

    @no_panic("at its vocabulary")
    def label(self, i: int) -> str:
        """Return the label of one id; see `labels`."""
        token = self.engine.id_to_token(i)
        if token is None:
            return f"⟨{i}⟩"
        if i in self.special_ids:
            return token
        text = self.decode_continuation([i])
        if "\ufffd" in text and BYTE_TOKEN.fullmatch(token):
            return f"⟨{token[3:5]}⟩"
        if "\ufffd" in text and all(c in BYTE_OF_CHARACTER for c in token):
            return "⟨" + " ".join(f"{BYTE_OF_CHARACTER[c]:02X}" for c in token) + "⟩"
        return "".join(VISIBLE_CHARACTERS.get(c, c) for c in text)


def make_byte_alphabet() -> dict[int, str]:
    """Return the printable character with which byte-level BPE writes each byte (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_OF_CHARACTER = {c: b for b, c in make_byte_alphabet().items()}
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # how SentencePiece writes a byte


def added_ids(engine: Engine) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor of `engine` puts before a text and after it."""
    with no_panic("at its post-processor"):
        words = (engine.id_to_token(i) for i in range(min(100, engine.get_vocab_size())))
        for probe in (*PROBES, *filter(None, words)):
            try:
                encoded = engine.encode(probe, add_special_tokens=True)
            except Exception:  # a text that it has no tokens for
                continue
            own = [i for i, sequence in enumerate(encoded.sequence_ids) if sequence is not None]
            if own:
                return tuple(encoded.ids[: own[0]]), tuple(encoded.ids[own[-1] + 1 :])
    return (), ()


def read_tokenizer_json(path: Path) -> Engine:
    """Return the tokenizer of a tokenizer.json, once a child process has read it without harm.

    Raises ValueError for a file that cannot be read, and for one that ends or blocks the process that reads it.
    """
    data = path.read_bytes()
    if (values := data.count(b",")) > MAX_JSON_VALUES:
        raise ValueError(f"{path}: a tokenizer.json of {values:,} values; expected at most {MAX_JSON_VALUES:,}")
    key = hashlib.sha256(data).hexdigest()
    try:
        vet(path, key)
        with no_panic("while it was read"):
            return Engine.from_buffer(data)  # from_str would hold 13 MB more for 49,000 tokens
    except Exception as e:  # tokenizers raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer.json that the tokenizers library can read: {e}") from e


def vet(path: Path, key: str) -> None:
    """Raise ValueError unless a child process can read this file, of this SHA-256, and encode a few texts with it."""
    if key not in VETTED:
        # The child reads the file itself: sending megabytes as JSON would take several copies of them here.
        if run_in_child(["read", str(path.absolute())]) != key:
            raise ValueError("it changed while it was read: load again")
        VETTED.add(key)


def run_in_child(job: list[Any]) -> Any:
    """Return the result of a job on an untrusted tokenizer in a child process; ValueError where it fails or hangs."""
    child = Child("text.tokenizer", MOST_MEMORY, MOST_JSON)
    try:
        is_good, result = child.ask(job, SECONDS)
    finally:
        child.close()
    if not is_good:
        raise ValueError(result)
    return result


def answer(job: list[Any]) -> tuple[bool, Any]:
    """Return (True, the result) or (False, the error message). Runs in the child process.

    The result of "convert" is the converted tokenizer, that of "read" the SHA-256 of the file that was read.
    """
    kind, source, *rest = job
    try:
        with no_panic("while it was read"):
            if kind == "convert":
                path, numbered = rest
                ranks = parse_ranks(source.encode("latin-1"), Path(path))
                special = None if numbered is None else {int(i): token for i, token in numbered}
                return True, build_bpe_tokenizer(ranks, special).to_str()
            data = Path(source).read_bytes()
            tokenizer = Tokenizer(Engine.from_buffer(data))
            for probe in PROBES:  # a text without an encoding is an error only when it is used
                with suppress(ValueError):
                    tokenizer.decode(tokenizer.encode_or_empty(probe))
            return True, hashlib.sha256(data).hexdigest()
    except Exception as e:
        return False, str(e)


def read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the chat template in `folder`, from its own file or the tokenizer's config; None without one."""
    if (path := folder / "chat_template.jinja").exists():
        try:
            return path.read_text(encoding="utf-8")
        except ValueError as e:
            raise ValueError(f"{path}: not a text in UTF-8: {e}") from e
    stated = config.get("chat_template")
    if isinstance(stated, list):
        named = [entry for entry in stated if isinstance(entry, dict) and entry.get("name") == "default"]
        stated = named[-1].get("template") if named else None
    return stated if isinstance(stated, str) else None


def read_special_tokens(config: dict[str, Any], path: Path) -> dict[int, str] | None:
    """Return the special tokens by id that a tokenizer_config.json lists; None where it lists none."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        found = {int(i): entry["content"] for i, entry in listed.items()}
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: added_tokens_decoder is {listed!r:.80}; expected ids with their content") from e
    if not all(isinstance(token, str) and 0 <= i < MAX_VOCABULARY for i, token in found.items()):
        raise ValueError(f"{path}: added_tokens_decoder is {listed!r:.80}; expected texts at ids from 0")
    return found or None


def convert_tiktoken(path: Path, special: dict[int, str] | None) -> Engine:
    """Return the tokenizer of a tiktoken-style tokenizer.model. Converting takes seconds: the user's cache keeps it.

    A cached file has the hash of its content in its name. One that is truncated, unreadable or altered is converted
    again. Without a writable cache folder every call converts.

    Raises ValueError for a file of another kind, such as the SentencePiece model of ChatGLM2 and ChatGLM3.
    """
    data = path.read_bytes()
    key = hashlib.sha256(data + json.dumps(special, sort_keys=True).encode() + b"2").hexdigest()[:32]
    if (text := read_converted(key)) is None:
        numbered = None if special is None else list(special.items())
        try:
            text = run_in_child(["convert", data.decode("latin-1"), str(path), numbered])
        except ChildError as e:
            raise ValueError(f"{path}: not a tokenizer.model that can be converted: {e}") from e
        write_converted(key, text)
    with no_panic("while it was read"):
        return Engine.from_str(text)


def cache_folder() -> Path:
    """Return the folder of converted tokenizers; OSError without a home folder."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return base / "glmlens" / "tokenizers"
    except RuntimeError as e:
        raise OSError("no home folder") from e


def read_converted(key: str) -> str | None:
    """Return the tokenizer that `write_converted` wrote under this key; None if it is absent or was changed."""
    with suppress(OSError, UnicodeDecodeError):
        for path in cache_folder().glob(f"{key}-*.json"):
            if path.is_file() and path.stat().st_size <= MOST_JSON:
                data = path.read_bytes()
                if path.stem == f"{key}-{hashlib.sha256(data).hexdigest()[:32]}":
                    return data.decode("utf-8")
    return None


def write_converted(key: str, text: str) -> None:
    """Write a tokenizer to the user's cache atomically; do nothing where it cannot be written."""
    data = text.encode("utf-8")
    with suppress(OSError):
        cache = cache_folder()
        cache.mkdir(parents=True, exist_ok=True)
        new = cache / f"{key}.{os.getpid()}.new"
        try:
            new.write_bytes(data)
            for bad in cache.glob(f"{key}-*.json"):
                bad.unlink()
            os.replace(new, cache / f"{key}-{hashlib.sha256(data).hexdigest()[:32]}.json")
        finally:
            new.unlink(missing_ok=True)


def parse_ranks(data: bytes, path: Path) -> dict[bytes, int]:
    """Return the tokens of a tiktoken file with their ranks; ValueError for a file of another kind."""
    try:
        lines = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as e:
        raise ValueError(
            f"{path}: expected lines of 'base64 rank', as GLM-4 has; a SentencePiece model (ChatGLM2, ChatGLM3) "
            f"cannot be read here: move it away and pass token ids"
        ) from e
    for token, rank in ranks.items():
        if not 0 <= rank < MAX_VOCABULARY or not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise ValueError(
                f"{path}: a token of {len(token)} bytes at rank {rank}; expected 1 to {MAX_TOKEN_BYTES} from rank 0"
            )
    return ranks


def build_bpe_tokenizer(ranks: dict[bytes, int], special: dict[int, str] | None = None) -> Engine:
    """Return a tiktoken vocabulary as byte-level BPE: each split of a token into two tokens is a merge, by rank."""
    alphabet = make_byte_alphabet()
    merges = []
    for token, rank in ranks.items():
        for i in range(1, len(token)):
            left, right = ranks.get(token[:i]), ranks.get(token[i:])
            if left is not None and right is not None:
                merges.append((rank, left, right, token[:i], token[i:]))
    merges.sort()

    def spell(token: bytes) -> str:
        return "".join(alphabet[b] for b in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    pairs = [(spell(left), spell(right)) for *_, left, right in merges]
    engine = Engine(models.BPE(vocab=vocab, merges=pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(GLM4_SPLIT_PATTERN), "isolated")
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, spelling])
    engine.decoder = decoders.ByteLevel()
    numbered = special or {len(ranks) + i: token for i, token in enumerate(GLM4_SPECIAL_TOKENS)}
    tokens = [AddedToken(numbered[i], special=True, normalized=False) for i in sorted(numbered)]
    engine.add_special_tokens(tokens)
    pieces = [(token, i) for token in PREFIX_TOKENS for i, known in numbered.items() if known == token]
    if len(pieces) == len(PREFIX_TOKENS):  # THUDM's ChatGLM4Tokenizer puts it before every text, and no file says so
        engine.post_processor = processors.TemplateProcessing(single=[*PREFIX_TOKENS, "$A"], special_tokens=pieces)
    for i, token in numbered.items():
        if engine.token_to_id(token) != i:
            raise ValueError(
                f"special token {token!r} is {i} in the config, but follows the vocabulary at another place"
            )
    return engine


@dataclass(frozen=True)
class RowTexts:
    """The labels and texts of some rows of ids, in place of the tokenizer in a pickled recording."""

    hash: str
    rows: Mapping[tuple[int, ...], tuple[list[str], list[str]]]  # ids to their labels and strings

    def labels(self, ids: Sequence[int]) -> list[str]:
        """Return the labels of one of the rows."""
        return self.rows[tuple(ids)][0]

    def decode_each(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token of one of the rows."""
        return self.rows[tuple(ids)][1]

    def fingerprint(self) -> str:
        """Return the fingerprint of the tokenizer."""
        return self.hash

    @staticmethod
    def of(tokenizer: "Tokenizer | RowTexts", rows: Sequence[Sequence[int]]) -> "RowTexts":
        texts = {tuple(ids): (tokenizer.labels(ids), tokenizer.decode_each(ids)) for ids in rows}
        return RowTexts(tokenizer.fingerprint(), texts)
