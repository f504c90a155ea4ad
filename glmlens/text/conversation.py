"""What comes after a KV cache: a text, the rest of a chat of which it holds the beginning, or its next message."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from glmlens.kv_cache import KVCache
from glmlens.text.chat import Message, TemplateError
from glmlens.text.tokenizer import Tokenizer

Render = Callable[[Sequence[Message]], str]
GLM_TURN = re.compile(
    r"<\|(system|user|assistant|observation)\|>(.*?)(?=<\|(?:system|user|assistant|observation)\|>|\Z)", re.S
)
CHATML_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.S)
BEFORE = {"system", "assistant"}  # a chat with a message of these roles is a whole one; others may come next


@dataclass(frozen=True)
class CachedRow:
    """What one row of a cache holds: the tokens of its entries, and the one that was chosen after them and not run.

    `whole` says whether it is known to hold a text from its first token on, without a gap.
    """

    tokens: list[int]
    chosen: list[int]
    whole: bool


def cached_rows(kv: KVCache) -> list[CachedRow]:
    """What every row of the cache holds."""
    chosen = [-1] * kv.batch if kv.chosen is None else kv.chosen.tolist()
    rows = []
    for at, ids, last in zip(
        kv.positions[:, : kv.length].tolist(), kv.tokens[:, : kv.length].tolist(), chosen, strict=True
    ):
        entries = [(p, i) for p, i in zip(at, ids, strict=True) if p != -1]  # the others are padding
        tokens = [i for _, i in entries]
        whole = [p for p, _ in entries] == list(range(len(entries))) and min(tokens, default=0) >= 0
        rows.append(CachedRow(tokens, [last] if last >= 0 else [], whole))
    return rows


def continue_text(text: str, row: CachedRow, tokenizer: Tokenizer) -> list[int]:
    """The ids that go on with `text` after a cache: those after what it holds, where the text is written in full.

    A text that is written with the tokenizer's prefix begins anew: it is the whole text. Any other comes after what
    the cache holds and the token that was chosen last.
    """
    ids = tokenizer.encode_raw(text).ids
    if tokenizer.prefix and tuple(ids[: len(tokenizer.prefix)]) == tokenizer.prefix:
        return rest_of_whole(ids, row, tokenizer, "text that begins with the prefix")
    return [*row.chosen, *tokenizer.encode_continuation(text)]


def continue_chat(messages: Sequence[Message], row: CachedRow, tokenizer: Tokenizer, render: Render) -> list[int]:
    """The ids that go on with a chat after a cache, which holds the beginning of the chat or all before `messages`.

    Raises ValueError where these are not known to be the ids of the whole conversation from there on.
    """
    ids = tokenizer.encode(render(messages), suffix=False)
    held = row.tokens
    whole = row.whole and (ids[: len(held)] == held or held[: len(ids)] == ids)
    if whole or any(message.get("role") in BEFORE for message in messages):
        return rest_of_whole(ids, row, tokenizer, "chat")
    return rest_after(messages, row, tokenizer, render)


def rest_of_whole(ids: list[int], row: CachedRow, tokenizer: Tokenizer, kind: str) -> list[int]:
    """The ids of a whole prompt that a cache of its beginning does not hold; ValueError where it holds another one."""
    if not row.whole:
        raise ValueError(
            f"a {kind} after this KV cache: entries of it are dropped, moved or of unknown tokens, so that the rest of "
            f"the {kind} is not known: pass the ids that come next, or run it without kv="
        )
    held = row.tokens
    same = next((i for i, (a, b) in enumerate(zip(ids, held, strict=False)) if a != b), min(len(ids), len(held)))
    if same < len(held) and same < len(ids):
        here, there = tokenizer.labels([ids[same], held[same]])
        before = "".join(tokenizer.labels(held[max(0, same - 5) : same]))
        raise ValueError(
            f"this {kind} is not one that the KV cache holds the beginning of: token {same}, after {before!r}, is "
            f"{here!r} here and {there!r} in the cache. Pass the {kind} as it was run (an answer with content="
            f"run.text.strip()), the next message alone, or token ids"
        )
    if same == len(ids):
        raise ValueError(
            f"the KV cache holds all {same} tokens of this {kind} already ({len(held)} entries). To go on, or to say "
            f"the same again, pass all of it with the answers and what comes next, or token ids; or leave out kv="
        )
    return ids[len(held) :]


def rest_after(messages: Sequence[Message], row: CachedRow, tokenizer: Tokenizer, render: Render) -> list[int]:
    """The ids of the next messages after the conversation that a cache holds.

    The conversation is read back from the cache's tokens and rendered with the next messages. Only where that begins
    with the very text that the cache holds is the rest of it what comes next.
    """
    held = [*row.tokens, *row.chosen]
    if not row.whole:
        raise ValueError(
            "the next message after this KV cache: entries of it are dropped, moved or of unknown tokens, so that the "
            "conversation so far is not known: pass the ids that come next"
        )
    text = tokenizer.decode(held)
    prefix = tokenizer.decode(tokenizer.prefix)
    for past in read_messages(text):
        try:
            whole = render([*past, *messages])
        except TemplateError:
            continue
        if not whole.startswith(prefix):
            whole = prefix + whole
        rest = tokenizer.encode_raw(whole.removeprefix(text)).ids
        ends = tokenizer.encode_raw(whole).ids[-len(rest) :] == rest
        # Behind a special token nothing is merged with what stands before it.
        if past and whole.startswith(text) and rest and rest[0] in tokenizer.special_ids and ends:
            return [*row.chosen, *rest]
    raise ValueError(
        f"the next message after this KV cache: the chat template writes the conversation so far in another way than "
        f"the cache holds it ({text[-60:]!r} at its end), so that the ids of the message alone are not known. Pass the "
        f"whole chat, with the answers, as it is with kv=; or without kv="
    )


def read_messages(text: str) -> Iterator[list[Message]]:
    """Yield the conversations that a template may have written as `text`, with GLM's marks of turns or ChatML's."""
    turns = GLM_TURN.findall(text)
    lines = [(role, *body.partition("\n")[::2]) for role, body in turns]
    yield [{"role": role, "content": body, **({"metadata": first} if first else {})} for role, first, body in lines]
    yield [{"role": role, "content": body} for role, body in turns]
    yield [{"role": role, "content": body.strip()} for role, body in turns]
    yield [{"role": role, "content": body} for role, body in CHATML_TURN.findall(text)]
