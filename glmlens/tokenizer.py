"""Text to token ids and back, with the `[gMASK]<sop>` prefix of a GLM exactly once."""

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Engine

PREFIX = ("[gMASK]", "<sop>")
GLM4_SPECIAL = [
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
]  # fmt: skip
GLM4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
MOST_TOKENS, LONGEST = 1 << 24, 1024  # of a vocabulary; bytes of a token: to find its merges costs their square
MOST_VALUES = 2_000_000  # GLM-4 has 800,000; to read one that is no tokenizer costs 100 bytes each
ROLES = ("system", "user", "assistant", "observation")  # <|user|> and the others begin a turn in every GLM chat
VISIBLE = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}


class Tokenizer:
    """A checkpoint's tokenizer and its chat template, if it has one.

    `prefix` holds the ids of `[gMASK]<sop>`, which a GLM sees before every text, or nothing when the vocabulary has
    none.
    """

    def __init__(self, engine: Engine, chat_template: str | None = None, named: dict[str, str] | None = None):
        engine.no_padding()
        engine.no_truncation()
        self.engine, self.chat_template, self.named = engine, chat_template, named or {}
        self.special = frozenset(engine.get_added_tokens_decoder())
        ids = [i for token in PREFIX if (i := engine.token_to_id(token)) is not None]
        self._words: list[str] | None = None
        self.prefix: tuple[int, ...] = tuple(ids) if len(ids) == len(PREFIX) else ()

    @staticmethod
    def from_folder(folder: Path) -> "Tokenizer | None":
        """The tokenizer in `folder`: tokenizer.json, or else a tiktoken-style tokenizer.model; None without either."""
        stated = folder / "tokenizer_config.json"
        try:
            config = json.loads(stated.read_text(encoding="utf-8")) if stated.exists() else {}
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{stated}: not readable as JSON: {e}") from e
        if not isinstance(config, dict):
            raise ValueError(f"{stated}: expected an object, found {type(config).__name__}")
        path, ranks = folder / "tokenizer.json", folder / "tokenizer.model"
        if path.exists():
            engine = read_engine(path)
        elif ranks.exists():
            engine = converted(ranks, special_tokens(config, stated))
        else:
            return None
        spelt = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        texts = {name: t.get("content") if isinstance(t, dict) else t for name, t in spelt.items()}
        named = {name: text for name, text in texts.items() if isinstance(text, str)}
        return Tokenizer(engine, chat_template(folder, config), named)

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        """The ids of `text`: with the prefix before it exactly once, or just as it is written."""
        ids = self.encoding(text).ids
        written = tuple(ids[: len(self.prefix)]) == self.prefix
        return [*self.prefix, *ids] if prefix and not written else ids

    def encoding(self, text: str) -> Any:
        """What the engine makes of `text`; ValueError if its rules come to no end, as regular expressions can."""
        try:
            return self.engine.encode(text, add_special_tokens=False)
        except BaseException as e:  # a panic of the engine is no Exception
            if type(e).__name__ != "PanicException":
                raise
            raise ValueError(f"the tokenizer of this checkpoint broke down at {text!r:.80}: {e}") from e

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text`, and the characters [start, end) that each stands for: none for a prefix that is added."""
        encoded = self.encoding(text)
        added = len(self.encode(text)) - len(encoded.ids)
        return [*self.prefix[:added], *encoded.ids], [(0, 0)] * added + encoded.offsets

    def without_prefix(self, ids: list[int]) -> list[int]:
        return ids[len(self.prefix) :] if tuple(ids[: len(self.prefix)]) == self.prefix else ids

    def decode(self, ids: Sequence[int], special: bool = True) -> str:
        """The text of `ids`, with or without special tokens."""
        return self.engine.decode(list(ids), skip_special_tokens=not special)

    def single(self, text: str) -> int:
        """The one id of `text`, without prefix; ValueError showing the tokens when it is not one."""
        ids = self.encode(text, prefix=False)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, not one: {self.strings(ids)}")
        return ids[0]

    def word_ids(self) -> list[int]:
        """The ids that are a space and a word, as they stand in the middle of a text."""
        ids = sorted(i for i in self.engine.get_vocab().values() if i not in self.special)
        texts = self.engine.decode_batch([[i] for i in ids])
        return [
            i for i, text in zip(ids, texts, strict=True) if text[:1] == " " and len(text) > 2 and text[1:].isalpha()
        ]

    def words(self) -> list[str]:
        """The texts of `word_ids`, each with its space."""
        if self._words is None:
            self._words = self.strings(self.word_ids())
        return self._words

    def fingerprint(self) -> str:
        """12 hex digits that tell this tokenizer from others."""
        return hashlib.sha256(self.engine.to_str().encode()).hexdigest()[:12]

    def strings(self, ids: Sequence[int]) -> list[str]:
        """Each id decoded by itself."""
        return [self.decode([i]) for i in ids]

    def labels(self, ids: Sequence[int], width: int | None = None) -> list[str]:
        """Each id as people can see it: spaces and newlines drawn, bytes of half a character in hex.

        An id without a token has its number. With `width`, longer labels end in an ellipsis. Nothing is escaped: that
        is for the surface on which they are shown.
        """
        labels = [self.label(i) for i in ids]
        return labels if width is None else [t if len(t) <= width else t[: width - 1] + "…" for t in labels]

    def roles(self, ids: Sequence[int]) -> list[str]:
        """Whose turn each id is in: that of the last role token, which is itself the first of its turn; "" before any.

        What counts is what the model sees: a role token that is written inside a message begins a turn for it too.
        """
        begins = {self.engine.token_to_id(f"<|{role}|>"): role for role in ROLES}
        if not begins.keys() & self.special:
            raise ValueError(f"this vocabulary has none of the role tokens {', '.join(f'<|{r}|>' for r in ROLES)}")
        found = [""]
        for i in ids:
            found.append(begins.get(i, found[-1]))
        return found[1:]

    def label(self, i: int) -> str:
        token = self.engine.id_to_token(i)
        if token is None:
            return f"⟨{i}⟩"
        if i in self.special:
            return token
        text = self.decode([i])
        if "\ufffd" in text and all(c in BYTE_OF for c in token):
            return "⟨" + " ".join(f"{BYTE_OF[c]:02X}" for c in token) + "⟩"
        return "".join(VISIBLE.get(c, c) for c in text)


def byte_alphabet() -> dict[int, str]:
    """How byte-level BPE writes each byte as a printable character (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_OF = {c: b for b, c in byte_alphabet().items()}


def read_engine(path: Path) -> Engine:
    if (values := path.read_bytes().count(b",")) > MOST_VALUES:
        raise ValueError(f"{path}: a tokenizer.json of {values:,} values; expected at most {MOST_VALUES:,}")
    try:
        return Engine.from_file(str(path))
    except Exception as e:  # tokenizers raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer.json that the tokenizers library can read: {e}") from e


def chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template in `folder`: in a file of its own, or in the tokenizer's config (where it may have a name)."""
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


def special_tokens(config: dict[str, Any], path: Path) -> dict[int, str] | None:
    """The special tokens that a tokenizer_config.json numbers, if it does."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        found = {int(i): entry["content"] for i, entry in listed.items()}
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: added_tokens_decoder is {listed!r:.80}; expected ids with their content") from e
    if not all(isinstance(token, str) and 0 <= i < MOST_TOKENS for i, token in found.items()):
        raise ValueError(f"{path}: added_tokens_decoder is {listed!r:.80}; expected texts at ids from 0")
    return found or None


def converted(path: Path, special: dict[int, str] | None) -> Engine:
    """The tokenizer of a tiktoken-style tokenizer.model, which takes seconds to make and is kept in the user's cache.

    Raises ValueError for a file of another kind, such as the SentencePiece model of ChatGLM2 and ChatGLM3.
    """
    data = path.read_bytes()
    name = hashlib.sha256(data + json.dumps(special, sort_keys=True).encode() + b"1").hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glmlens" / "tokenizers"
    kept = cache / f"{name}.json"
    if kept.exists():
        return read_engine(kept)
    engine = from_ranks(ranks_of(data, path), special)
    with suppress(OSError):  # where the cache cannot be written, it is made again next time
        cache.mkdir(parents=True, exist_ok=True)
        new = cache / f"{name}.{os.getpid()}.new"
        new.write_text(engine.to_str(), encoding="utf-8")
        os.replace(new, kept)
    return engine


def ranks_of(data: bytes, path: Path) -> dict[bytes, int]:
    try:
        lines = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as e:
        raise ValueError(
            f"{path}: expected lines of 'base64 rank', as GLM-4 has; a SentencePiece model (ChatGLM2, ChatGLM3) "
            f"cannot be read here: move it away and pass token ids"
        ) from e
    for token, rank in ranks.items():
        if not 0 <= rank < MOST_TOKENS or not 0 < len(token) <= LONGEST:
            raise ValueError(
                f"{path}: a token of {len(token)} bytes at rank {rank}; expected 1 to {LONGEST} from rank 0"
            )
    return ranks


def from_ranks(ranks: dict[bytes, int], special: dict[int, str] | None = None) -> Engine:
    """The same tokenizer as byte-level BPE: every split of a token into two tokens is a merge, in order of rank."""
    spelt = byte_alphabet()
    merges = []
    for token, rank in ranks.items():
        for i in range(1, len(token)):
            left, right = ranks.get(token[:i]), ranks.get(token[i:])
            if left is not None and right is not None:
                merges.append((rank, left, right, token[:i], token[i:]))
    merges.sort()

    def spell(token: bytes) -> str:
        return "".join(spelt[b] for b in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    pairs = [(spell(left), spell(right)) for *_, left, right in merges]
    engine = Engine(models.BPE(vocab=vocab, merges=pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(GLM4_SPLIT), "isolated")
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, spelling])
    engine.decoder = decoders.ByteLevel()
    numbered = special or {len(ranks) + i: token for i, token in enumerate(GLM4_SPECIAL)}
    tokens = [AddedToken(numbered[i], special=True, normalized=False) for i in sorted(numbered)]
    engine.add_special_tokens(tokens)
    for i, token in numbered.items():
        if engine.token_to_id(token) != i:
            raise ValueError(f"special token {token!r} is said to be {i}, but follows the vocabulary at another place")
    return engine


@dataclass(frozen=True)
class RowTexts:
    """What a tokenizer says of some rows of ids, kept where the tokenizer itself is not: in a pickled recording."""

    hash: str
    rows: Mapping[tuple[int, ...], tuple[list[str], list[str]]]  # ids to their labels and strings

    def labels(self, ids: Sequence[int]) -> list[str]:
        return self.rows[tuple(ids)][0]

    def strings(self, ids: Sequence[int]) -> list[str]:
        return self.rows[tuple(ids)][1]

    def fingerprint(self) -> str:
        return self.hash

    @staticmethod
    def of(tokenizer: "Tokenizer | RowTexts", rows: Sequence[Sequence[int]]) -> "RowTexts":
        texts = {tuple(ids): (tokenizer.labels(ids), tokenizer.strings(ids)) for ids in rows}
        return RowTexts(tokenizer.fingerprint(), texts)
