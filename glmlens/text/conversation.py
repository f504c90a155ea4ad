"""Continue a KV cache with a text, the rest of a chat whose beginning is cached, or the next message of a chat."""

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
WHOLE_CHAT_ROLES = {"system", "assistant"}  # messages of these roles occur in whole chats, not in next messages


@dataclass(frozen=True)
class CachedRow:
    """One row of a cache: the tokens of its entries, and the token that was chosen last and not run yet.

    `is_complete` is True where the entries are known to be a text from its first token on, without gaps.
    """

    tokens: list[int]
    chosen: list[int]
    is_complete: bool


def read_cached_rows(kv: KVCache) -> list[CachedRow]:
    """Return the tokens of every row of the cache."""
    chosen = [-1] * kv.batch if kv.chosen is None else kv.chosen.tolist()
    rows = []
    for at, ids, last in zip(
        kv.positions[:, : kv.length].tolist(), kv.tokens[:, : kv.length].tolist(), chosen, strict=True
    ):
        entries = [(p, i) for p, i in zip(at, ids, strict=True) if p != -1]  # -1 is padding
        tokens = [i for _, i in entries]
        is_complete = [p for p, _ in entries] == list(range(len(entries))) and min(tokens, default=0) >= 0
        rows.append(CachedRow(tokens, [last] if last >= 0 else [], is_complete))
    return rows


def continue_text(text: str, row: CachedRow, tokenizer: Tokenizer) -> list[int]:
    """Return the ids with which `text` continues a cache.

    A text written with the tokenizer's prefix is the whole text: its ids after the cached ones. Any other text follows
    the cached tokens and the token that was chosen last.
    """
    ids = tokenizer.encode_raw(text).ids
    if tokenizer.prefix and tuple(ids[: len(tokenizer.prefix)]) == tokenizer.prefix:
        return get_uncached_ids(ids, row, tokenizer, "text that begins with the prefix")
    return [*row.chosen, *tokenizer.encode_continuation(text)]


def continue_chat(messages: Sequence[Message], row: CachedRow, tokenizer: Tokenizer, render: Render) -> list[int]:
    """Return the ids with which a chat continues a cache, which holds its beginning or everything before `messages`.

    Raises ValueError where the ids cannot be shown to be those of the whole conversation after the cache.
    """
    ids = tokenizer.encode(render(messages), suffix=False)
    cached = row.tokens
    begins_alike = ids[: len(cached)] == cached or cached[: len(ids)] == ids
    if (row.is_complete and begins_alike) or any(message.get("role") in WHOLE_CHAT_ROLES for message in messages):
        return get_uncached_ids(ids, row, tokenizer, "chat")
    return render_next_messages(messages, row, tokenizer, render)


def get_uncached_ids(ids: list[int], row: CachedRow, tokenizer: Tokenizer, kind: str) -> list[int]:
    """Return the ids of a whole prompt after the cached ones; ValueError where the cache begins otherwise."""
    if not row.is_complete:
        raise ValueError(
            f"a {kind} after this KV cache: entries of it are dropped, moved or of unknown tokens, so that the rest of "
            f"the {kind} is not known: pass the ids that come next, or run it without kv="
        )
    held = row.tokens
    # The number of ids at the beginning that are the same in both.
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


def render_next_messages(
    messages: Sequence[Message], row: CachedRow, tokenizer: Tokenizer, render: Render
) -> list[int]:
    """Return the ids of the next messages after the conversation in a cache.

    The conversation is parsed from the text of the cached tokens and rendered with the next messages. Where the result
    begins with exactly the cached text, its rest is the text of the next messages; otherwise ValueError.
    """
    held = [*row.tokens, *row.chosen]
    if not row.is_complete:
        raise ValueError(
            "the next message after this KV cache: entries of it are dropped, moved or of unknown tokens, so that the "
            "conversation so far is not known: pass the ids that come next"
        )
    text = tokenizer.decode(held)
    prefix = tokenizer.decode(tokenizer.prefix)
    for past in read_messages(text):
        try:
            rendered = render([*past, *messages])
        except TemplateError:
            continue
        if not rendered.startswith(prefix):
            rendered = prefix + rendered
        rest = tokenizer.encode_raw(rendered.removeprefix(text)).ids
        ends_alike = tokenizer.encode_raw(rendered).ids[-len(rest) :] == rest
        # A special token is never merged with the text before it: the ids of the rest do not depend on that text.
        if past and rendered.startswith(text) and rest and rest[0] in tokenizer.special_ids and ends_alike:
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
