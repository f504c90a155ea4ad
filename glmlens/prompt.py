"""Prompts of every kind - text, texts, chats, token ids - to token ids and their mask, and ids to what people read."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from glmlens import chat
from glmlens.chat import Message
from glmlens.conversation import cached_rows, continue_chat, continue_text
from glmlens.integers import Integer, read_integer
from glmlens.kv_cache import KVCache
from glmlens.model import GLM
from glmlens.tokenizer import Tokenizer


@runtime_checkable
class Rows(Protocol):
    """Prompts that have been tokenized and know their positions by name, as the examples of a task do."""

    @property
    def tokens(self) -> list[list[int]]: ...
    def at(self, name: str) -> Tensor: ...


Prompt = (
    str
    | Sequence[str]
    | Sequence[int]
    | Sequence[Sequence[int]]
    | Sequence[Message]
    | Sequence[Sequence[Message]]
    | Tensor
    | Rows
)
"""Text, several texts, chat messages ({"role", "content"}), several chats, token ids [pos] or [batch, pos], or rows
of ids of several lengths.

With start_layer it is a residual stream [batch, pos, model].
"""


class Prompts:
    """What a lens says about text."""

    model: GLM
    tokenizer: Tokenizer | None
    pad_id: int

    def to_batch(self, prompt: Prompt, prefix: bool = True) -> tuple[Int[Tensor, "batch pos"], Tensor | None]:
        """Token ids [batch, pos], left-padded, and their attention mask (None where there is no padding).

        Token tensors pass unchanged; in one, padding ids before the model's prefix are padding.
        """
        if isinstance(prompt, Tensor):
            tokens = prompt[None] if prompt.ndim == 1 else prompt
            rows = []
        elif isinstance(prompt, Rows):
            tokens, rows = None, prompt.tokens
        elif isinstance(prompt, str):
            tokens, rows = None, [self._text().encode(prompt, prefix)]
        elif len(prompt) and all(isinstance(text, str) for text in prompt):
            tokens, rows = None, [self._text().encode(cast(str, text), prefix) for text in prompt]
        elif len(prompt) and all(isinstance(i, int) for i in prompt):
            tokens, rows = None, [list(cast(Sequence[int], prompt))]
        elif len(prompt) and all(isinstance(row, list | tuple) and row and isinstance(row[0], int) for row in prompt):
            tokens, rows = None, [list(cast(Sequence[int], row)) for row in prompt]
        elif len(prompt) and all(isinstance(message, Mapping) for message in prompt):
            tokens, rows = None, [self._chat_ids(cast(Sequence[Message], prompt), prefix)]
        elif len(prompt) and all(isinstance(c, list | tuple) and isinstance(c[0], Mapping) for c in prompt if c):
            tokens, rows = None, [self._chat_ids(cast(Sequence[Message], messages), prefix) for messages in prompt]
        else:
            raise TypeError(
                f"a prompt is text, texts, chat messages, chats, token ids or rows of them; got {prompt!r:.80}"
            )
        if tokens is None:
            tokens, mask = padded(rows, self.pad_id)
        else:
            mask = self._written_padding(tokens)
        self._check_ids(tokens)
        device = self.model.ln_final.weight.device
        return tokens.to(device, torch.long), None if mask is None else mask.to(device)

    def _chat_ids(self, messages: Sequence[Message], prefix: bool) -> list[int]:
        """The ids of what the template writes, with the prefix where it does not write that; nothing behind it."""
        ids = self._text().encode(self.render(messages), prefix, suffix=False)
        return ids if prefix else self._text().without_prefix(ids)

    def continue_prompt(self, prompt: Prompt, kv: KVCache | None) -> Prompt:
        """The ids of what a text or a chat comes to after a cache; other prompts as they are.

        A text comes after what the cache holds; so does the next message of a chat, where the template is known to
        write it in the same way. Of a whole chat, and of a text with the prefix before it, it is what the cache does
        not hold yet. Raises ValueError where it holds another beginning.
        """
        if kv is None or not kv.length or kv.positions.is_meta or isinstance(prompt, Tensor | Rows):
            return prompt
        many = list(prompt) if isinstance(prompt, list | tuple) and not is_chat(prompt) else [prompt]
        rows = cached_rows(kv) if many and all(isinstance(one, str) or is_chat(one) for one in many) else []
        if len(rows) != len(many):
            return prompt  # what does not fit is said where it is run
        return [
            continue_text(one, row, self._text())
            if isinstance(one, str)
            else continue_chat(cast(Sequence[Message], one), row, self._text(), self.render)
            for one, row in zip(many, rows, strict=True)
        ]

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """The text of chat messages by the checkpoint's own template, run where it can do no harm.

        By default the assistant is asked to speak next, unless the last message is its own. With
        `continue_final_message` the text ends where the last message does, to be continued; a name is that of the field
        that is continued, instead of "content". Other `variables` are the template's, such as enable_thinking.

        Raises ValueError without a template, TemplateError for one that fails, TypeError for a variable (or tools) that
        the template does not read.
        """
        template = self._text().chat_template
        if template is None:
            raise ValueError("this checkpoint has no chat template: write the text of the chat yourself")
        chat.check_messages(messages)
        chat.check_tools(tools)
        required = [*variables, *(["tools"] if tools else [])]
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message and messages[-1].get("role") != "assistant"
        variables = {"documents": None, **self._text().named, **variables}
        variables |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
        if not continue_final_message:
            return chat.render(template, messages, required, **variables)
        if add_generation_prompt:
            raise ValueError("add_generation_prompt begins a message after the one that continue_final_message goes on")
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        return chat.render_open(template, messages, field, required, **variables)

    def _written_padding(self, tokens: Tensor) -> Tensor | None:
        prefix = torch.tensor(self.tokenizer.prefix if self.tokenizer else (), device=tokens.device)
        if not len(prefix) or tokens.is_meta or tokens.ndim != 2:
            return None
        starts = (tokens.unfold(1, len(prefix), 1) == prefix).all(-1) if tokens.shape[1] >= len(prefix) else None
        if starts is None or not bool(starts.any(1).all()):
            return None
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        before = columns < starts.int().argmax(1, keepdim=True)
        padding = before & (tokens == self.pad_id)
        return ~padding if bool(padding.any()) and torch.equal(padding, before) else None

    def _check_ids(self, tokens: Tensor) -> None:
        if tokens.is_floating_point() or tokens.ndim != 2:
            raise ValueError(f"token ids are whole numbers [batch, pos]; got {tokens.dtype} {tuple(tokens.shape)}")
        if not tokens.numel():
            raise ValueError("the prompt has no tokens")
        if not tokens.is_meta and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.model.cfg.d_vocab:
            found = f"{int(tokens.min())} to {int(tokens.max())}"
            raise ValueError(f"token ids run from {found}; this model has 0 to {self.model.cfg.d_vocab - 1}")

    def to_tokens(self, prompt: Prompt, prefix: bool = True) -> Int[Tensor, "batch pos"]:
        """Token ids [batch, pos]; `to_batch` gives their mask too.

        Before a text stands, once, what its tokenizer puts there (`[gMASK]<sop>`, a BOS, nothing), and behind it what
        it puts there (an EOS, mostly nothing): the ids are those of transformers. With prefix=False there is neither.
        A chat has the prefix once too, whether or not its template writes it, and nothing behind what that writes.
        """
        return self.to_batch(prompt, prefix)[0]

    def to_single_token(self, text: str) -> int:
        """The one id of `text`, as it is written: " Mary" with its space; ValueError showing its tokens if not one."""
        return self._text().single(text)

    def to_answer(self, answer: str | Integer) -> int:
        """Which logit stands for an answer: the text of one token, the name of a label of a class head, or the number.

        Raises ValueError for a name that is no label, and for a number that no logit has.
        """
        cfg = self.model.cfg
        if not cfg.d_logits:
            raise ValueError(f"answer {answer!r}: this checkpoint has no unembedding, and no logit stands for anything")
        if isinstance(answer, str) and cfg.labels and answer not in cfg.labels:
            raise ValueError(f"{answer!r} is no label of this model: choose from {', '.join(map(repr, cfg.labels))}")
        if isinstance(answer, str):
            return cfg.labels.index(answer) if cfg.labels else self.to_single_token(answer)
        answer = read_integer(answer, "answer")
        if not 0 <= answer < cfg.d_logits:
            raise ValueError(f"answer {answer}; this model has 0 to {cfg.d_logits - 1}")
        return answer

    def answer_label(self, answer: int) -> str:
        """What people read for a logit: its token, or its label."""
        if self.model.cfg.labels:
            return self.model.cfg.labels[answer]
        return self.tokenizer.label(answer) if self.tokenizer else f"⟨{answer}⟩"

    def to_str_tokens(self, prompt: Prompt, prefix: bool = True) -> list[str] | list[list[str]]:
        """Each token's text: a list, or for several prompts a list of lists without their padding.

        It is the text that the token has in the middle of others: with the space that it begins with, also where a
        SentencePiece-like tokenizer has put that space before the text.
        """
        tokens, mask = self.to_batch(prompt, prefix)
        real = tokens >= 0 if mask is None else mask.bool()
        rows = [self._text().strings(row[keep].tolist()) for row, keep in zip(tokens, real, strict=True)]
        return rows[0] if len(rows) == 1 else rows

    def to_labels(self, prompt: Prompt, width: int | None = None, prefix: bool = True) -> list[str]:
        """A label for every token of one prompt, for people to read: ids without a token have one too."""
        tokens, _ = self.to_batch(prompt, prefix)
        if tokens.shape[0] != 1:
            raise ValueError(f"labels are for one prompt, not {tokens.shape[0]}")
        if self.tokenizer is None:
            return [f"⟨{i}⟩" for i in tokens[0].tolist()]
        return self.tokenizer.labels(tokens[0].tolist(), width)

    def roles(self, prompt: Prompt, prefix: bool = True) -> list[str]:
        """Whose turn every token of one prompt is in: "system", "user", "assistant", "observation" (what a tool said).

        "" stands before the first turn. ValueError for a vocabulary without role tokens.
        """
        tokens, _ = self.to_batch(prompt, prefix)
        if tokens.shape[0] != 1:
            raise ValueError(f"roles are for one prompt, not {tokens.shape[0]}")
        return self._text().roles(tokens[0].tolist())

    def to_string(self, tokens: Tensor | Sequence[int], continues: bool = False) -> str:
        """The text of one row of token ids, as it is where a text begins, or where it `continues` another one.

        A SentencePiece-like tokenizer leaves out the space of the first token where a text begins.
        """
        ids = torch.as_tensor(tokens)
        if (ids.numel() and ids.is_floating_point()) or (ids.ndim > 1 and ids.numel() != ids.shape[-1]):
            raise ValueError(f"a text is of one row of token ids; got {ids.dtype} {tuple(ids.shape)}")
        decode = self._text().decode_continuation if continues else self._text().decode
        return decode(ids.flatten().tolist())

    def _text(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer.json: pass token ids, a LongTensor [batch, pos]")
        return self.tokenizer


def is_chat(prompt: object) -> bool:
    """Whether this is a list of messages."""
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(m, Mapping) for m in prompt)


def padded(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Rows of ids as one left-padded tensor, and its attention mask unless they are all of one length."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows], dtype=torch.long)
    if all(len(row) == longest for row in rows):
        return tokens, None
    return tokens, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
