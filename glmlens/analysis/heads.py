"""Scores of heads on repeated random words: previous-token, duplicate-token, induction and copying heads."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glmlens.analysis.attention import layer_pattern, pattern_points
from glmlens.analysis.prompt_batch import PromptBatch, describe_kv_groups, to_numpy
from glmlens.analysis.qk_ov_circuits import copying_scores
from glmlens.dtypes import upcast
from glmlens.integers import Integer, read_integer
from glmlens.lens import Lens
from glmlens.results import Labelled, LabelledGroup
from glmlens.text_tables import format_table

REPEATS = 4  # how often Olsson et al. repeat their words


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(LabelledGroup):
    """Scores of every head [layer, head], and the `chance` of each: the score of uniform causal attention.

    `previous`, `duplicate`, `induction` and `prefix_matching` are shares of the attention that does not go to the
    model's prefix `[gMASK]<sop>`; `on_prefix` is the share that does. `copying` depends on the weights only.
    """

    chance: Mapping[str, float]
    previous: Labelled
    duplicate: Labelled
    induction: Labelled
    prefix_matching: Labelled
    copying: Labelled
    on_prefix: Labelled

    def best(self, score: str, n: Integer = 4) -> list[tuple[int, int, float]]:
        """Return the n heads with the highest score, highest first: (layer, head, score)."""
        highest = self.sheets()[score].top(n, largest=True)
        return [(int(layer), int(head), value) for (layer, head), value in highest]

    def __repr__(self) -> str:
        rows = [("score", "by chance", "highest (layer.head)")]
        for name in self.sheets():
            heads = "  ".join(f"{layer}.{head} {value:.2f}" for layer, head, value in self.best(name))
            rows.append((name, f"{self.chance[name]:.3f}", heads))
        about = "".join(f"\n  {field}: {text}" for field, text in self.about.items())
        return f"HeadScores{about}\n{format_table(rows)}"


def head_scores(
    lens: Lens,
    *,
    rows: Integer = 4,
    length: Integer = 20,
    seed: Integer = 0,
    words: Iterable[Integer] | Iterable[str] | None = None,
) -> HeadScores:
    """Return scores of every head on rows of `length` different random words r, repeated.

    Each is a share of the attention of words, without what goes to the prefix:
    - previous: to the word before (in `prefix r r`);
    - duplicate: from the second r, to the same word in the first;
    - induction: from the second r, to the word that followed it in the first (Elhage et al. 2021, A Mathematical
      Framework for Transformer Circuits);
    - prefix_matching: the same in `prefix r r r r`, to all words that followed it before (Olsson et al. 2022, arXiv
      2209.11895, "Prefix matching").

    copying is `copying_scores`, and on_prefix the share of all attention that goes to the prefix. `words` are texts of
    one token, or ids: by default all tokens that are a space and letters, or without a tokenizer all ids. Raises
    ValueError when there are fewer than `length`. A head that attends to the prefix only has nan.
    """
    ids = draw_words(lens, rows, length, seed, words)
    prefix = lens.tokenizer.prefix if lens.tokenizer else ()
    twice = RepeatedWordPatterns.record(lens, ids, prefix, 2)
    often = RepeatedWordPatterns.record(lens, ids, prefix, REPEATS)
    targets = {
        "previous": twice.previous_mask(),
        "duplicate": twice.same_word_mask(),
        "induction": twice.after_same_word_mask(),
    }
    scores_with_chance = {
        **twice.measure_shares(targets),
        **often.measure_shares({"prefix_matching": often.after_same_word_mask()}),
        "on_prefix": twice.measure_prefix_share(),
    }
    about = {
        "metric": "share of attention", "direction": "higher is more of this kind",
        "positions": f"{rows} rows of {length} random words, twice (prefix_matching: {REPEATS} times), seed {seed}",
        "prefix": f"{len(prefix)} columns excluded", "kv": describe_kv_groups(lens), "model": lens.model_hash,
    }  # fmt: skip
    sheets = {
        name: Labelled(to_numpy(scores), ("layer", "head"), {}, {**about, "metric": name, "chance": f"{chance:.3g}"})
        for name, (scores, chance) in scores_with_chance.items()
    }
    chances = {name: chance for name, (_, chance) in scores_with_chance.items()} | {"copying": 0.0}
    return HeadScores(about, chances, copying=copying_scores(lens), **sheets)


def draw_words(
    lens: Lens, rows: Integer, length: Integer, seed: Integer, words: Iterable[Integer] | Iterable[str] | None
) -> Int[Tensor, "batch word"]:
    """Return rows of `length` different ids, drawn at random. Raise ValueError where there are fewer words."""
    rows, length = (read_integer(n, what, least=1) for n, what in ((rows, "rows"), (length, "length")))
    if words is None:
        words = lens.tokenizer.list_word_ids() if lens.tokenizer else list(range(lens.cfg.d_vocab))
    given = (lens.to_single_token(i) if isinstance(i, str) else read_integer(i, "a word", least=0) for i in words)
    ids = torch.tensor(sorted(set(given)))  # in an order that does not depend on how the words were given
    if not 2 <= length <= len(ids):
        raise ValueError(f"length is {length}, and there are {len(ids)} different words: give 2 to {len(ids)}")
    draw = torch.Generator().manual_seed(read_integer(seed, "seed"))
    return torch.stack([ids[torch.randperm(len(ids), generator=draw)[:length]] for _ in range(rows)])


ScoresWithChance = dict[str, tuple[Float[Tensor, "layer head"], float]]
"""By name, the scores of all heads and that of uniform causal attention."""


@dataclass(frozen=True, eq=False)
class RepeatedWordPatterns:
    """Patterns of every layer on words repeated several times after a prefix, and which word is at each position."""

    patterns: list[Float[Tensor, "batch head query key"]]
    word_index: Int[Tensor, "pos"]  # the number of the word; in the prefix negative, all different

    @staticmethod
    def record(lens: Lens, ids: Int[Tensor, "batch word"], prefix: Sequence[int], times: int) -> "RepeatedWordPatterns":
        """Run rows of words, repeated `times` times after the prefix, and record all patterns."""
        tokens = torch.cat([torch.tensor(prefix, dtype=torch.long).expand(len(ids), -1), ids.repeat(1, times)], 1)
        rows = PromptBatch.from_prompt(lens, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        acts = rows.record(pattern_points(lens))
        positions = rows.positions
        patterns = [upcast(layer_pattern(acts, layer, positions, positions)) for layer in range(lens.cfg.n_layers)]
        word = torch.cat([torch.arange(-len(prefix), 0), torch.arange(ids.shape[1]).repeat(times)])
        return RepeatedWordPatterns(patterns, word.to(lens.device))

    def query_and_key_indices(self) -> tuple[Int[Tensor, "query one"], Int[Tensor, "key"]]:
        """Return the column numbers of queries and keys, which broadcast to [query, key]."""
        columns = torch.arange(len(self.word_index), device=self.word_index.device)
        return columns[:, None], columns

    def previous_mask(self) -> Bool[Tensor, "query key"]:
        """Return True where the key is the word before the query."""
        query, key = self.query_and_key_indices()
        return (key == query - 1) & (self.word_index >= 0)

    def same_word_mask(self) -> Bool[Tensor, "query key"]:
        """Return True where the key is an earlier occurrence of the query's word."""
        query, key = self.query_and_key_indices()
        return (self.word_index[:, None] == self.word_index) & (key < query)

    def after_same_word_mask(self) -> Bool[Tensor, "query key"]:
        """Return True where the key follows an earlier occurrence of the query's word."""
        follows = self.same_word_mask().roll(1, 1)
        follows[:, 0] = False  # rolled in from the last column
        return follows

    def measure_shares(self, targets: Mapping[str, Bool[Tensor, "query key"]]) -> ScoresWithChance:
        """Return the share of attention on each target, of every head and of uniform causal attention."""
        uniform = self.uniform_attention()
        return {
            name: (
                torch.stack([self.attention_share(x, target) for x in self.patterns]),
                float(self.attention_share(uniform, target)),
            )
            for name, target in targets.items()
        }

    def attention_share(
        self, attention: Float[Tensor, "batch head query key"], target: Bool[Tensor, "query key"]
    ) -> Float[Tensor, "head"]:
        """Return the attention on the target over that on all words, summed over the queries that have a target."""
        with_target = target.any(1)
        rows = attention[:, :, with_target]
        on_target = (rows * target[with_target]).sum((0, 2, 3))
        on_words = (rows * (self.word_index >= 0)).sum((0, 2, 3))
        return on_target / on_words

    def measure_prefix_share(self) -> tuple[Float[Tensor, "layer head"], float]:
        """Return the share of the words' attention that goes to the prefix, of every head and by chance."""
        words = self.word_index >= 0
        shares = [x[:, :, words][..., ~words].sum(-1).mean((0, 2)) for x in (*self.patterns, self.uniform_attention())]
        return torch.stack(shares[:-1]), float(shares[-1])

    def uniform_attention(self) -> Float[Tensor, "batch head query key"]:
        """Return the pattern of uniform causal attention: each query attends equally to all keys it sees."""
        query, key = self.query_and_key_indices()
        visible = (key <= query).to(self.patterns[0].dtype)
        return (visible / visible.sum(-1, keepdim=True))[None, None]
