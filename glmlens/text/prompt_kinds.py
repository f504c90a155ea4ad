"""Recognise the kind of a prompt: texts, chats, or token ids with their mask. Anything else is a TypeError.

This is the only reader of prompts in the package. It looks at types alone and needs no tokenizer or model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

Message = Mapping[str, Any]


@runtime_checkable
class TokenizedPrompts(Protocol):
    """Prompts that have been tokenized and know their positions by name, as the examples of a task do."""

    @property
    def tokens(self) -> list[list[int]]: ...
    def at(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Texts:
    """One text or several."""

    texts: list[str]


@dataclass(frozen=True)
class Chats:
    """One chat or several, each a list of messages."""

    chats: list[Sequence[Message]]


@dataclass(frozen=True)
class TokenRow:
    """A row of token ids [pos], and its mask [pos] (1 is real, 0 is padding) where that is known."""

    ids: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids. With `exact` none of them is padding, even if it is the padding id."""

    rows: list[TokenRow]
    exact: bool = False


KINDS = "text, texts, chat messages, chats, token ids, rows of token ids, or a mapping with input_ids"
NOT_LISTS = (str, bytes, bytearray, memoryview)
OTHER_INPUTS = ("inputs_embeds", "past_key_values", "pixel_values")  # with these a model would compute something else


def read_prompt(prompt: Any) -> Texts | Chats | TokenRows:
    """Return the texts, chats or rows of token ids that `prompt` is.

    Raises TypeError for everything that is no prompt, with its type and what to pass instead; ValueError for an empty
    one and for a mask that does not fit its ids or is not padding on the left.
    """
    if isinstance(prompt, str):
        return Texts([prompt])
    if is_array(prompt):
        return TokenRows(read_array(prompt))
    if isinstance(prompt, Mapping):
        if "input_ids" not in prompt:
            raise TypeError(describe_bad_prompt(prompt))
        return TokenRows(read_encoding(prompt))
    if isinstance(prompt, TokenizedPrompts) and isinstance(prompt.tokens, list):
        return TokenRows([TokenRow(torch.tensor(row, dtype=torch.long)) for row in prompt.tokens], exact=True)
    if not isinstance(prompt, Sequence) or isinstance(prompt, NOT_LISTS):
        raise TypeError(describe_bad_prompt(prompt))
    return read_list(prompt)


def read_prompts(prompts: Any) -> Iterable[Any]:
    """Return any number of prompts as an iterable of texts, chats or rows of token ids.

    Raises TypeError for one prompt, whose iteration would yield letters, messages, ids or keys instead of prompts.
    """
    several = "prompts are a list or an iterator of texts, chats or rows of token ids"
    if isinstance(prompts, TokenizedPrompts) and isinstance(prompts.tokens, list):
        return prompts.tokens
    if isinstance(prompts, (Mapping, set, frozenset, *NOT_LISTS)) or not isinstance(prompts, Iterable):
        hint = ": put one prompt in a list, [prompt]" if isinstance(prompts, Mapping | str) else ""
        raise TypeError(f"{several}; got {type(prompts).__name__} {prompts!r:.80}{hint}")
    if isinstance(prompts, Tensor | np.ndarray) and prompts.ndim == 1:
        raise TypeError(f"{several}; got one row of ids: put it in a list, [prompt]")
    if is_array(prompts) and get_attached_mask(prompts) is not None:  # rows of ids alone would lose the mask
        return [row.ids if row.mask is None else row.ids[row.mask.bool()] for row in read_array(prompts)]
    return prompts


def check_one_prompt(prompt: Any, number: int) -> None:
    """Raise TypeError for an element of many prompts that is not one prompt of its own."""
    kind = classify_element(prompt)
    if kind == "a message":
        chat = "it is a message, and a chat is a list of messages"
        what = chat if "role" in prompt else describe_bad_prompt(prompt)
    elif kind == "a token id":
        what = "it is a token id, and a prompt is a list of them"
    else:
        what = None if kind else describe_bad_prompt(prompt)
    if what is not None:
        raise TypeError(f"prompt {number}: {what}")


def read_list(prompt: Sequence[Any]) -> Texts | Chats | TokenRows:
    """Return the prompts in a list, whose elements must all be of one kind."""
    if not len(prompt):
        raise ValueError(f"an empty {type(prompt).__name__} is no prompt; a prompt is {KINDS}")
    if all(type(i) is int for i in prompt):  # the common case, quickly
        return TokenRows([TokenRow(torch.tensor(prompt, dtype=torch.long))])
    kinds = [classify_element(element) for element in prompt]
    for i, kind in enumerate(kinds):
        if kind is None:
            raise TypeError(f"element {i} of the prompt: {describe_bad_prompt(prompt[i])}")
        if kind != kinds[0]:
            raise TypeError(f"a prompt of mixed kinds: element 0 is {kinds[0]}, element {i} is {kind}; pass {KINDS}")
    if kinds[0] == "a text":
        return Texts(list(prompt))
    if kinds[0] == "a token id":
        return TokenRows([TokenRow(list_to_ids(prompt))])
    if kinds[0] == "a message":
        return Chats([check_messages(prompt)])
    if kinds[0] == "a chat":
        return Chats([check_messages(messages) for messages in prompt])
    return TokenRows([read_row(element, i) for i, element in enumerate(prompt)])


def classify_element(element: Any) -> str | None:
    """Return the kind of an element of a list of prompts; None for anything that is no part of a prompt."""
    if isinstance(element, str):
        return "a text"
    if is_whole_number(element):
        return "a token id"
    if is_array(element):
        return "a row of token ids"
    if isinstance(element, Mapping):
        return "a row of token ids" if "input_ids" in element else "a message"
    if not isinstance(element, Sequence) or isinstance(element, NOT_LISTS):
        return None
    if all(type(i) is int for i in element) or all(map(is_whole_number, element)):
        return "a row of token ids"
    if all(isinstance(message, Mapping) and "input_ids" not in message for message in element):
        return "a chat"
    return None


def read_row(element: Any, i: int) -> TokenRow:
    """Return one row of a list of rows: ids, an array of them, or a mapping with input_ids."""
    if isinstance(element, Mapping):
        rows = read_encoding(element)
    elif is_array(element):
        rows = read_array(element)
    else:
        rows = [TokenRow(list_to_ids(element))]
    if len(rows) != 1:
        raise TypeError(f"element {i} of the prompt has {len(rows)} rows of token ids; pass one row in each")
    return rows[0]


def read_array(array: Any) -> list[TokenRow]:
    """Return the rows of a tensor or numpy array of token ids, [pos] or [batch, pos]."""
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "iu":
            raise TypeError(f"token ids are whole numbers; got a numpy array of {array.dtype}{hint_of_array(array)}")
        ids = torch.from_numpy(array.astype(np.int64))
    else:
        if array.dtype == torch.bool or array.is_floating_point() or array.is_complex():
            raise TypeError(f"token ids are whole numbers [batch, pos]; got {array.dtype} {tuple(array.shape)}")
        ids = array
    if ids.ndim not in (1, 2):
        raise TypeError(f"token ids are whole numbers [batch, pos] or [pos]; got shape {tuple(ids.shape)}")
    if not ids.numel():
        raise ValueError("the prompt has no tokens")
    mask = get_attached_mask(array)
    if ids.ndim == 1:
        return [TokenRow(ids, mask)]
    return [TokenRow(row, None if mask is None else mask[i]) for i, row in enumerate(ids)]


def get_attached_mask(array: Any) -> Tensor | None:
    """Return the mask that `Lens.to_tokens` attached to a padded tensor, if the shapes still agree."""
    mask = getattr(array, "attention_mask", None)
    return mask if isinstance(mask, Tensor) and mask.shape == array.shape else None


def read_encoding(encoding: Mapping[str, Any]) -> list[TokenRow]:
    """Return the rows of a mapping with input_ids, as tokenizers make it, each with its attention_mask."""
    other = [name for name in OTHER_INPUTS if encoding.get(name) is not None]
    if other:
        raise TypeError(f"a prompt with {', '.join(other)}: only input_ids and attention_mask are read from a mapping")
    rows = read_ids(encoding["input_ids"], "input_ids")
    if encoding.get("attention_mask") is None:
        return rows
    masks = [row.ids for row in read_ids(encoding["attention_mask"], "attention_mask", boolean=True)]
    if [len(mask) for mask in masks] != [len(row.ids) for row in rows]:
        raise ValueError("attention_mask and input_ids of the prompt have different shapes")
    for i, mask in enumerate(masks):
        refuse_padding_elsewhere(mask, i)
    found = [TokenRow(row.ids, mask.to(row.ids.device)) for row, mask in zip(rows, masks, strict=True)]
    if (given := encoding.get("position_ids")) is not None:
        refuse_other_positions(found, given)
    return found


def read_ids(value: Any, name: str, boolean: bool = False) -> list[TokenRow]:
    """Return rows of whole numbers, from an array or from lists."""
    if isinstance(value, Tensor | np.ndarray) and boolean and str(value.dtype).endswith("bool"):
        value = torch.as_tensor(value).long()
    if is_array(value):
        return read_array(value)
    if isinstance(value, Sequence) and not isinstance(value, NOT_LISTS) and len(value):
        found = read_list(booleans_to_numbers(value) if boolean else value)
        if isinstance(found, TokenRows):
            return found.rows
    raise TypeError(f"{name} of a prompt: expected rows of whole numbers, got {type(value).__name__} {value!r:.60}")


def booleans_to_numbers(mask: Sequence[Any]) -> list[Any]:
    """Return a mask in lists with 1 for True and 0 for False."""
    rows = [booleans_to_numbers(row) if isinstance(row, list | tuple) else row for row in mask]
    return [int(x) if isinstance(x, bool) else x for x in rows]


def refuse_padding_elsewhere(mask: Tensor, row: int) -> None:
    """Raise ValueError for a mask that is anything but padding on the left of at least one token."""
    if mask.is_meta:
        return
    if bool(((mask != 0) & (mask != 1)).any()) or not bool(mask.any()):
        raise ValueError(f"attention_mask of row {row}: expected 1 at tokens, 0 at padding, and at least one token")
    if bool((mask.diff() < 0).any()):
        raise ValueError(
            f"attention_mask of row {row} has padding after tokens; prompts are padded on the left here: make the "
            "encoding with padding_side='left', or pass the texts"
        )


def refuse_other_positions(rows: list[TokenRow], given: Any) -> None:
    """Raise ValueError for position_ids that do not count the tokens of every row from 0."""
    for i, (row, at) in enumerate(zip(rows, read_ids(given, "position_ids"), strict=True)):
        real = cast(Tensor, row.mask).bool()
        if at.ids.shape != row.ids.shape or at.ids[real].tolist() != list(range(int(real.sum()))):
            raise ValueError(f"position_ids of row {i} do not count its tokens from 0: pass them as position_ids=")


def check_messages(messages: Any) -> Sequence[Message]:
    """Return the messages of a chat; TypeError for one that a chat template cannot take, with what to write instead.

    A message has a role and content: a text, or a list of parts ({"type": "text", ...}), or none beside tool_calls.
    """
    if isinstance(messages, Mapping):
        raise TypeError("one chat message; a chat is a list of them: pass [message]")
    if not isinstance(messages, Sequence) or isinstance(messages, NOT_LISTS):
        raise TypeError(f"a chat is a list of messages; got {type(messages).__name__}")
    if not len(messages):
        raise ValueError("a chat without messages: give at least one")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"message {i} of a chat: {describe_bad_prompt(message)}")
        content = message.get("content")
        if isinstance(content, str):
            continue
        if content is None and (message.get("tool_calls") or message.get("function_call")):
            continue
        if isinstance(content, list | tuple) and all(is_part(part) for part in content):
            continue
        what = "is missing" if "content" not in message else f"is {type(content).__name__} {content!r:.60}"
        raise TypeError(
            f"message {i} of a chat: its content {what}; expected a text or a list of parts such as "
            '{"type": "text", "text": ...} (of data for a tool message, json.dumps(data))'
        )
    return messages


def plain_data(prompt: Any) -> Any:
    """Return a prompt as lists, numbers and texts alone, to compare it with another. It is not checked."""
    if isinstance(prompt, Tensor | np.ndarray):
        return prompt.tolist()
    if isinstance(prompt, Mapping):
        return {name: plain_data(value) for name, value in prompt.items()}
    if isinstance(prompt, np.generic):
        return prompt.item()
    return type(prompt)(map(plain_data, prompt)) if type(prompt) in (list, tuple) else prompt


def is_part(part: Any) -> bool:
    """Whether this is a part of a message: a text, or a mapping that names its type."""
    return isinstance(part, str) or (isinstance(part, Mapping) and isinstance(part.get("type"), str))


def is_array(x: Any) -> bool:
    """Whether x is a tensor or numpy array with at least one axis: a row of ids, or several."""
    return isinstance(x, Tensor | np.ndarray) and x.ndim > 0


def is_whole_number(x: Any) -> bool:
    """Whether x is one whole number, of Python, numpy or torch; True and False are not."""
    if isinstance(x, bool | np.bool_):
        return False
    if isinstance(x, Tensor):
        return x.ndim == 0 and x.dtype != torch.bool and not x.is_floating_point() and not x.is_complex()
    return isinstance(x, int | np.integer) or (isinstance(x, np.ndarray) and x.ndim == 0 and x.dtype.kind in "iu")


def list_to_ids(ids: Sequence[Any]) -> Tensor:
    """Return whole numbers of Python, numpy or torch as a tensor of ids."""
    return torch.tensor([int(i) for i in ids], dtype=torch.long)


def describe_bad_prompt(x: Any) -> str:
    """Return the error message for x, which is no prompt, with what to pass instead."""
    article = "an" if type(x).__name__[0] in "aeiouAEIOU" else "a"
    return f"a prompt is {KINDS}; got {article} {type(x).__name__}, {x!r:.80}{hint_for(x)}"


def hint_for(x: Any) -> str:
    """Return a hint of what to pass instead of x; empty where none is known."""
    if isinstance(x, Mapping):
        return hint_for_mapping(x)
    if isinstance(x, bytes | bytearray | memoryview):
        return ": decode it to text first, .decode()"
    if isinstance(x, set | frozenset):
        return ": a set has no order, pass a list"
    if hasattr(x, "ids") and hasattr(x, "attention_mask"):
        return ": pass its ids, .ids"
    if isinstance(x, Sequence) and not isinstance(x, str):
        return ": in a list of prompts each is a text, a chat, or a row of token ids"
    return ": pass list(...) of it" if isinstance(x, Iterable) and not isinstance(x, Tensor | np.ndarray) else ""


def hint_for_mapping(x: Mapping[Any, Any]) -> str:
    """Return a hint for a mapping that is no prompt: one message, a row of a dataset, or other names of fields."""
    if "role" in x:
        return ": one message of a chat stands in a list, [message]"
    if "from" in x and "value" in x:
        roles = '{"human": "user", "gpt": "assistant"}'
        return (
            f': write messages as [{{"role": {roles}.get(m["from"], m["from"]), "content": m["value"]}} for m in chat]'
        )
    for name in ("text", "messages", "conversations", "prompt"):
        if name in x:
            return f': of a row of a dataset pass its {name}, row["{name}"]'
    return ": a message has a role and content"


def hint_of_array(array: np.ndarray) -> str:
    """Return a hint for an array that holds no ids; empty but for arrays of texts."""
    return ": pass array.tolist() for a list of texts" if array.dtype.kind in "UO" else ""
