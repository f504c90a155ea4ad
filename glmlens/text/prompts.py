"""Convert prompts of every kind (texts, chats, token ids) to token ids and a mask, and ids to labels and text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import Unpack

from glmlens.foreign_keywords import NoKeywords, refuse_keywords
from glmlens.integers import Integer, read_integer
from glmlens.kv_cache import KVCache
from glmlens.model import GLM
from glmlens.text import chat
from glmlens.text.chat import Message
from glmlens.text.conversation import continue_chat, continue_text, read_cached_rows
from glmlens.text.prompt_kinds import Chats, Texts, TokenizedPrompts, TokenRow, check_messages, read_prompt
from glmlens.text.tokenizer import Tokenizer

Prompt = (
    str
    | Sequence[str]
    | Sequence[int]
    | Sequence[Sequence[int]]
    | Sequence[Message]
    | Sequence[Sequence[Message]]
    | Sequence[Tensor]
    | Sequence[np.integer]
    | Sequence[Sequence[np.integer]]
    | Sequence[np.ndarray]
    | Mapping[str, Any]
    | Tensor
    | np.ndarray
    | TokenizedPrompts
)
"""Text, several texts, chat messages ({"role", "content"}), several chats, token ids [pos] or [batch, pos] of Python,
numpy or torch, rows of ids of several lengths, or a mapping with input_ids and attention_mask, as tokenizers make it.

With start_layer it is a residual stream [batch, pos, model].
"""


class TextMixin:
    """The methods of a lens on text: tokenizing, chat templates, labels."""

    model: GLM
    tokenizer: Tokenizer | None
    pad_id: int

    def to_batch(
        self,
        prompt: Prompt,
        prefix: bool = True,
        attention_mask: Tensor | None = None,
        *,
        may_be_open: bool = False,
    ) -> tuple[Int[Tensor, "batch pos"], Tensor | None]:
        """Return token ids [batch, pos], left-padded, and their attention mask (None without padding).

        Token ids pass unchanged. In them, padding ids right before the model's prefix are padding. A row that begins
        with the padding id and continues without the prefix is ambiguous: ValueError, unless `attention_mask` or the
        mask of a mapping decides it, or `may_be_open` takes the ids as tokens. Where the ids alone are ambiguous the
        mask is returned even if it is all ones. Raises TypeError for anything that is no prompt; see `prompt_kinds`.
        """
        found = read_prompt(prompt)
        device = self.model.ln_final.weight.device
        if isinstance(found, Texts):
            rows = [
                TokenRow(torch.tensor(self.require_tokenizer().encode(text, prefix)).long()) for text in found.texts
            ]
        elif isinstance(found, Chats):
            rows = [TokenRow(torch.tensor(self._encode_chat(messages, prefix)).long()) for messages in found.chats]
        else:
            rows = found.rows
        rows = [TokenRow(row.ids.to(device, torch.long), row.mask) for row in rows]
        may_hold_padding = not isinstance(found, Texts | Chats) and not found.exact
        if len({len(row.ids) for row in rows}) > 1:
            rows = [
                self._without_padding(row, i, may_be_open) if may_hold_padding else row for i, row in enumerate(rows)
            ]
            may_hold_padding = False
        tokens, mask = pad_rows(rows, self.pad_id)
        self.check_token_ids(tokens)
        if attention_mask is not None:
            return tokens, check_mask(attention_mask.to(device), mask)
        if mask is None and may_hold_padding:
            mask = self._find_padding(tokens, may_be_open)
        if mask is None or (not mask.is_meta and bool(mask.all())):
            mask = torch.ones_like(tokens) if self._is_open(tokens) else None
        return tokens, mask

    def _without_padding(self, row: TokenRow, number: int, may_be_open: bool) -> TokenRow:
        """Return a row of ids without its padding, known from its mask or as padding ids before the prefix."""
        mask = row.mask
        if mask is None:
            masks = self._find_padding(row.ids[None], may_be_open, number)
            mask = None if masks is None else masks[0]
        return TokenRow(row.ids if mask is None else row.ids[mask.to(row.ids.device).bool()])

    def _encode_chat(self, messages: Sequence[Message], prefix: bool) -> list[int]:
        """Return the ids of a rendered chat, with the prefix where the template does not write it, without suffix."""
        ids = self.require_tokenizer().encode(self.render(messages), prefix, suffix=False)
        return ids if prefix else self.require_tokenizer().strip_prefix(ids)

    def continue_prompt(self, prompt: Prompt, kv: KVCache | None) -> Prompt:
        """Return the ids with which a text or chat continues a cache; other prompts unchanged.

        A text follows the cached tokens. So does the next message of a chat, where the template is known to write it
        the same way. Of a whole chat, and of a text that begins with the prefix, only the ids that are not cached yet
        are returned. Raises ValueError where the cache holds another beginning.
        """
        if kv is None or not kv.length or kv.positions.is_meta or isinstance(prompt, Tensor):
            return prompt
        asked = read_prompt(prompt)
        if not isinstance(asked, Texts | Chats):
            return prompt
        rows = read_cached_rows(kv)
        prompts = asked.texts if isinstance(asked, Texts) else asked.chats
        if len(rows) != len(prompts):
            return prompt  # the run raises the error for a batch of another size
        if isinstance(asked, Texts):
            return [
                continue_text(text, row, self.require_tokenizer()) for text, row in zip(asked.texts, rows, strict=True)
            ]
        return [
            continue_chat(messages, row, self.require_tokenizer(), self.render)
            for messages, row in zip(asked.chats, rows, strict=True)
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
        """Return the text of chat messages rendered by the checkpoint's own template, in a sandbox.

        By default an assistant turn is opened at the end, unless the last message is the assistant's. With
        `continue_final_message` the text ends where the last message ends, to be continued; a string names the field
        to continue, instead of "content". Other `variables` are the template's, such as enable_thinking.

        Raises ValueError without a template, TemplateError for one that fails, TypeError for a variable (or tools) that
        the template does not read.
        """
        template = self.require_tokenizer().chat_template
        if template is None:
            raise ValueError("this checkpoint has no chat template: write the text of the chat yourself")
        check_messages(messages)
        chat.check_tools(tools)
        required = [*variables, *(["tools"] if tools else [])]
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message and messages[-1].get("role") != "assistant"
        variables = {"documents": None, **self.require_tokenizer().named_tokens, **variables}
        variables |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
        if not continue_final_message:
            return chat.render_chat(template, messages, required, **variables)
        if add_generation_prompt:
            raise ValueError("add_generation_prompt begins a message after the one that continue_final_message goes on")
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        return chat.render_open(template, messages, field, required, **variables)

    def _leading_padding(self, tokens: Tensor) -> Int[Tensor, "batch"]:
        """Return the number of padding ids at the beginning of each row."""
        return (tokens == self.pad_id).long().cumprod(1).sum(1)

    def _is_open(self, tokens: Tensor) -> bool:
        """Whether it is ambiguous from the ids alone if they begin with padding: a row begins with the padding id."""
        return not tokens.is_meta and tokens.shape[1] > 1 and bool((tokens[:, 0] == self.pad_id).any())

    def _find_padding(self, tokens: Tensor, may_be_open: bool, number: int = 0) -> Tensor | None:
        """Return the mask of ids with padding before the prefix; None where no row begins with the padding id.

        Raises ValueError for a row that begins with the padding id and continues without the prefix. A row of one
        token is never padding. `number` is the index of the first row, for the message.
        """
        if not self._is_open(tokens):
            return None
        prefix = torch.tensor(self.tokenizer.prefix if self.tokenizer else (), device=tokens.device).long()
        leading = self._leading_padding(tokens)
        # The prefix may itself begin with the padding id: the last of the leading ids are then the prefix's.
        starts = leading - int(self._leading_padding(prefix[None])) if len(prefix) else leading
        columns = starts[:, None] + torch.arange(len(prefix), device=tokens.device)
        fits = (starts >= 0) & (columns[:, -1] < tokens.shape[1]) if len(prefix) else torch.zeros_like(leading).bool()
        seen = tokens.gather(1, columns.clamp(0, tokens.shape[1] - 1))
        clear = (leading == 0) | (fits & (seen == prefix).all(1))
        if not bool(clear.all()):
            if may_be_open:
                return None
            raise ValueError(self._describe_open_row(tokens, number, int((~clear).int().argmax())))
        starts = torch.where(leading == 0, 0, starts)
        return (torch.arange(tokens.shape[1], device=tokens.device) >= starts[:, None]).long()

    def _describe_open_row(self, tokens: Tensor, first: int, row: int) -> str:
        """Return the error message for a row of ids that may begin with padding."""
        name = repr(self.tokenizer.label(self.pad_id)) if self.tokenizer else "no name"
        here = "ids" if tokens.shape[0] == 1 else f"row {first + row} of ids"
        many = int(self._leading_padding(tokens)[row])
        return (
            f"{here} beginning with {many} of the padding id {self.pad_id} ({name}): "
            'whether they are padding cannot be seen. Pass the texts, or {"input_ids": ids, "attention_mask": mask}, '
            "where mask is 0 at padding (lens.to_batch(texts) gives both), all ones where nothing is padding"
        )

    def check_token_ids(self, tokens: Tensor) -> None:
        """Raise ValueError unless these are token ids [batch, pos] of this model's vocabulary."""
        if tokens.is_floating_point() or tokens.ndim != 2:
            raise ValueError(f"token ids are whole numbers [batch, pos]; got {tokens.dtype} {tuple(tokens.shape)}")
        if not tokens.numel():
            raise ValueError("the prompt has no tokens")
        if not tokens.is_meta and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.model.cfg.d_vocab:
            found = f"{int(tokens.min())} to {int(tokens.max())}"
            raise ValueError(f"token ids run from {found}; this model has 0 to {self.model.cfg.d_vocab - 1}")

    def to_tokens(self, prompt: Prompt, prefix: bool = True, **unknown: Unpack[NoKeywords]) -> Int[Tensor, "batch pos"]:
        """Return token ids [batch, pos]; `to_batch` returns their mask too.

        The ids are those of transformers: a text has the tokenizer's prefix (`[gMASK]<sop>`, a BOS, or nothing) and
        suffix (an EOS, mostly nothing) exactly once; with prefix=False neither. A chat has the prefix exactly once,
        whether or not its template writes it, and no suffix.

        With padding, the tensor carries its mask as the attribute `tokens.attention_mask`, which a lens uses when the
        tensor is passed to it. Slices and copies do not have the attribute: padding before the prefix is still
        recognised, and where it cannot be, a lens raises ValueError.
        """
        refuse_keywords("to_tokens", unknown, ["prompt", "prefix"])
        tokens, mask = self.to_batch(prompt, prefix, may_be_open=True)
        if mask is not None and not isinstance(prompt, Tensor):
            setattr(tokens, "attention_mask", mask)  # noqa: B010 - torch's types know no such attribute
        return tokens

    def to_single_token(self, text: str) -> int:
        """Return the one id of `text`, such as " Mary" with its space; ValueError showing the tokens if not one."""
        return self.require_tokenizer().encode_single(text)

    def to_answer(self, answer: str | Integer) -> int:
        """Return the index of an answer's logit: for the text of one token, a label of a class head, or an index.

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
        """Return the label of a logit: its token, or its class in a class head."""
        if self.model.cfg.labels:
            return self.model.cfg.labels[answer]
        return self.tokenizer.label(answer) if self.tokenizer else f"⟨{answer}⟩"

    def to_str_tokens(
        self, prompt: Prompt, prefix: bool = True, **unknown: Unpack[NoKeywords]
    ) -> list[str] | list[list[str]]:
        """Return each token's text: a list, or for several prompts a list of lists, without padding.

        The text is that of the token in the middle of others, with its leading space, also where a SentencePiece-like
        tokenizer added that space before the text.
        """
        refuse_keywords("to_str_tokens", unknown, ["prompt", "prefix"])
        tokens, mask = self.to_batch(prompt, prefix, may_be_open=True)
        real = tokens >= 0 if mask is None else mask.bool()
        rows = [
            self.require_tokenizer().decode_each(row[keep].tolist()) for row, keep in zip(tokens, real, strict=True)
        ]
        return rows[0] if len(rows) == 1 else rows

    def to_labels(self, prompt: Prompt, width: int | None = None, prefix: bool = True) -> list[str]:
        """Return a readable label for every token of one prompt; ids without a token have one too."""
        tokens, _ = self.to_batch(prompt, prefix, may_be_open=True)
        if tokens.shape[0] != 1:
            raise ValueError(f"labels are for one prompt, not {tokens.shape[0]}")
        if self.tokenizer is None:
            return [f"⟨{i}⟩" for i in tokens[0].tolist()]
        return self.tokenizer.labels(tokens[0].tolist(), width)

    def roles(self, prompt: Prompt, prefix: bool = True) -> list[str]:
        """Return the role of the turn of every token of one prompt: "system", "user", "assistant" or "observation".

        "observation" is the output of a tool, "" anything before the first turn. ValueError for a vocabulary without
        role tokens.
        """
        tokens, _ = self.to_batch(prompt, prefix, may_be_open=True)
        if tokens.shape[0] != 1:
            raise ValueError(f"roles are for one prompt, not {tokens.shape[0]}")
        return self.require_tokenizer().roles(tokens[0].tolist())

    def to_string(self, tokens: Tensor | Sequence[int], continues: bool = False) -> str:
        """Return the text of one row of token ids, at the beginning of a text or where it `continues` another one.

        A SentencePiece-like tokenizer leaves out the space of the first token where a text begins.
        """
        ids = torch.as_tensor(tokens)
        if (ids.numel() and ids.is_floating_point()) or (ids.ndim > 1 and ids.numel() != ids.shape[-1]):
            raise ValueError(f"a text is of one row of token ids; got {ids.dtype} {tuple(ids.shape)}")
        decode = self.require_tokenizer().decode_continuation if continues else self.require_tokenizer().decode
        return decode(ids.flatten().tolist())

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer; ValueError in a checkpoint without one."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer.json: pass token ids, a LongTensor [batch, pos]")
        return self.tokenizer


def pad_rows(rows: list[TokenRow], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Return rows of ids as one left-padded tensor, and its attention mask; None for equal lengths without masks."""
    empty = [i for i, row in enumerate(rows) if not len(row.ids)]
    if empty:
        raise ValueError("the prompt has no tokens" if len(rows) == 1 else f"prompt {empty[0]} has no tokens")
    longest = max(len(row.ids) for row in rows)
    tokens = torch.stack([torch.nn.functional.pad(row.ids, (longest - len(row.ids), 0), value=pad_id) for row in rows])
    if all(len(row.ids) == longest and row.mask is None for row in rows):
        return tokens, None
    masks = [torch.ones_like(row.ids) if row.mask is None else row.mask.to(row.ids) for row in rows]
    return tokens, torch.stack([torch.nn.functional.pad(mask, (longest - len(mask), 0)) for mask in masks])


def check_mask(given: Tensor, known: Tensor | None) -> Tensor:
    """Return the mask that was passed; ValueError where it marks as tokens what is known to be padding."""
    if known is not None and given.shape == known.shape and bool((given.bool() & ~known.bool()).any()):
        raise ValueError("attention_mask takes padding of the prompt for tokens: leave it out, the prompt has its own")
    return given
