"""Text to token ids and back, with the `[gMASK]<sop>` prefix of a GLM exactly once."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Engine

PREFIX = ("[gMASK]", "<sop>")


class Tokenizer:
    """A checkpoint's tokenizer.json.

    `prefix` holds the ids of `[gMASK]<sop>`, which a GLM sees before every text, or nothing when the vocabulary has
    none.
    """

    def __init__(self, engine: Engine):
        engine.no_padding()
        engine.no_truncation()
        self.engine = engine
        ids = [i for token in PREFIX if (i := engine.token_to_id(token)) is not None]
        self.prefix: tuple[int, ...] = tuple(ids) if len(ids) == len(PREFIX) else ()

    @staticmethod
    def from_folder(folder: Path) -> "Tokenizer | None":
        """The tokenizer in `folder`, or None where there is none."""
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            return Tokenizer(Engine.from_file(str(path)))
        except Exception as e:  # tokenizers raises nothing narrower
            raise ValueError(f"{path}: not a tokenizer.json that the tokenizers library can read: {e}") from e

    def encode(self, text: str, prefix: bool = True) -> list[int]:
        """The ids of `text`: with the prefix before it exactly once, or just as it is written."""
        ids = self.engine.encode(text, add_special_tokens=False).ids
        written = tuple(ids[: len(self.prefix)]) == self.prefix
        return [*self.prefix, *ids] if prefix and not written else ids

    def decode(self, ids: Sequence[int], special: bool = True) -> str:
        """The text of `ids`, with or without special tokens."""
        return self.engine.decode(list(ids), skip_special_tokens=not special)

    def single(self, text: str) -> int:
        """The one id of `text`, without prefix; ValueError showing the tokens when it is not one."""
        ids = self.encode(text, prefix=False)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, not one: {self.strings(ids)}")
        return ids[0]

    def ordinary_ids(self) -> list[int]:
        """The ids that stand for text, not for structure."""
        special = self.engine.get_added_tokens_decoder()
        return [i for i in sorted(self.engine.get_vocab().values()) if i not in special]

    def strings(self, ids: Sequence[int]) -> list[str]:
        """Each id decoded by itself."""
        return [self.decode([i]) for i in ids]
