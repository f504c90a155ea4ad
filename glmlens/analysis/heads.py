"""What heads attend to when random words are said again: the scores by which kinds of heads are known."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glmlens.analysis.attention import layer_pattern, pattern_points
from glmlens.analysis.batch import PromptBatch, describe_kv_groups, to_numpy, upcast
from glmlens.analysis.circuits import copying_scores
from glmlens.integers import Integer, read_integer
from glmlens.lens import Lens
from glmlens.results import Labelled, LabelledGroup
from glmlens.text_tables import format_table

REPEATS = 4  # as often as Olsson et al. say their words


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(LabelledGroup):
    """Scores of every head [layer, head], and the `chance` of each: what a head has that attends alike to all it sees.

    `previous`, `duplicate`, `induction` and `prefix_matching` are shares of the attention that does not go to the
    model's prefix `[gMASK]<sop>`; `on_prefix` is the share that does. `copying` is of the weights.
    """

    chance: Mapping[str, float]
    previous: Labelled
    duplicate: Labelled
    induction: Labelled
    prefix_matching: Labelled
    copying: Labelled
    on_prefix: Labelled

    def best(self, score: str, n: Integer = 4) -> list[tuple[int, int, float]]:
        """The n heads with the highest score: (layer, head, score)."""
        found = self.sheets()[score].top(n, largest=True)
        return [(int(layer), int(head), value) for (layer, head), value in found]

    def __repr__(self) -> str:
        rows = [("score", "by chance", "highest (layer.head)")]
        for name in self.sheets():
            heads = "  ".join(f"{layer}.{head} {value:.2f}" for layer, head, value in self.best(name))
            rows.append((name, f"{self.chance[name]:.3f}", heads))
        about = "".join(f"\n  {what}: {said}" for what, said in self.about.items())
        return f"HeadScores{about}\n{format_table(rows)}"


def head_scores(
    lens: Lens,
    *,
    rows: Integer = 4,
    length: Integer = 20,
    seed: Integer = 0,
    words: Iterable[Integer] | Iterable[str] | None = None,
) -> HeadScores:
    """Scores of every head on rows of `length` different random words r, said again.

    Of the attention of words that does not go to the prefix, the share that goes
    - previous: to the word before (in `prefix r r`);
    - duplicate: from the second r, to the same word in the first;
    - induction: from the second r, to the word that followed it in the first (Elhage et al. 2021, A Mathematical
      Framework for Transformer Circuits);
    - prefix_matching: the same in `prefix r r r r`, to all words that followed it before (Olsson et al. 2022, arXiv
      2209.11895, "Prefix matching").

    copying is `copying_scores`, and on_prefix the share of all attention that goes to the prefix. `words` are texts of
    one token, or ids: by default all tokens that are a space and letters, or without a tokenizer all ids. Raises
    ValueError when there are fewer than `length`. A head that attends to nothing but the prefix has nan.
    """
    ids, prefix = draw_words(lens, rows, length, seed, words), lens.tokenizer.prefix if lens.tokenizer else ()
    twice, often = (
        RepeatedWordPatterns.record(lens, ids, prefix, 2),
        RepeatedWordPatterns.record(lens, ids, prefix, REPEATS),
    )
    found = twice.measure_shares(
        {
            "previous": twice.previous_mask(),
            "duplicate": twice.same_word_mask(),
            "induction": twice.after_same_word_mask(),
        }
    )
    found |= often.measure_shares({"prefix_matching": often.after_same_word_mask()}) | {
        "on_prefix": twice.measure_prefix_share()
    }
    about = {
        "metric": "share of attention", "direction": "higher is more of this kind",
        "positions": f"{rows} rows of {length} random words said twice (prefix_matching: {REPEATS} times), seed {seed}",
        "prefix": f"{len(prefix)} columns excluded", "kv": describe_kv_groups(lens), "model": lens.model_hash,
    }  # fmt: skip
    sheets = {
        name: Labelled(to_numpy(scores), ("layer", "head"), {}, {**about, "metric": name, "chance": f"{chance:.3g}"})
        for name, (scores, chance) in found.items()
    }
    chances = {name: chance for name, (_, chance) in found.items()} | {"copying": 0.0}
    return HeadScores(about, chances, copying=copying_scores(lens), **sheets)


def draw_words(
    lens: Lens, rows: Integer, length: Integer, seed: Integer, words: Iterable[Integer] | Iterable[str] | None
) -> Int[Tensor, "batch word"]:
    """Rows of different ids, drawn at random."""
    rows, length = (read_integer(n, what, least=1) for n, what in ((rows, "rows"), (length, "length")))
    if words is None:
        words = lens.tokenizer.list_word_ids() if lens.tokenizer else list(range(lens.cfg.d_vocab))
    spelt = (lens.to_single_token(i) if isinstance(i, str) else read_integer(i, "a word", least=0) for i in words)
    ids = torch.tensor(sorted(set(spelt)))
    if not 2 <= length <= len(ids):
        raise ValueError(f"length is {length}, and there are {len(ids)} different words: give 2 to {len(ids)}")
    draw = torch.Generator().manual_seed(read_integer(seed, "seed"))
    return torch.stack([ids[torch.randperm(len(ids), generator=draw)[:length]] for _ in range(rows)])


ScoresWithChance = dict[str, tuple[Float[Tensor, "layer head"], float]]


@dataclass(frozen=True, eq=False)
class RepeatedWordPatterns:
    """Rows of words said several times after a prefix: the pattern of every layer, and which word stands where."""

    patterns: list[Float[Tensor, "batch head query key"]]
    word_index: Int[Tensor, "pos"]  # its number among the words; no two alike in the prefix

    @staticmethod
    def record(lens: Lens, ids: Int[Tensor, "batch word"], prefix: Sequence[int], times: int) -> "RepeatedWordPatterns":
        tokens = torch.cat([torch.tensor(prefix, dtype=torch.long).expand(len(ids), -1), ids.repeat(1, times)], 1)
        rows = PromptBatch.from_prompt(lens, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        acts = rows.record(pattern_points(lens))
        at = rows.positions
        patterns = [upcast(layer_pattern(acts, layer, at, at)) for layer in range(lens.cfg.n_layers)]
        word = torch.cat([torch.arange(-len(prefix), 0), torch.arange(ids.shape[1]).repeat(times)])
        return RepeatedWordPatterns(patterns, word.to(lens.device))

    def query_and_key_indices(self) -> tuple[Int[Tensor, "query one"], Int[Tensor, "key"]]:
        here = torch.arange(len(self.word_index), device=self.word_index.device)
        return here[:, None], here

    def previous_mask(self) -> Bool[Tensor, "query key"]:
        query, key = self.query_and_key_indices()
        return (key == query - 1) & (self.word_index >= 0)

    def same_word_mask(self) -> Bool[Tensor, "query key"]:
        """The same word, earlier."""
        query, key = self.query_and_key_indices()
        return (self.word_index[:, None] == self.word_index) & (key < query)

    def after_same_word_mask(self) -> Bool[Tensor, "query key"]:
        """What followed the same word, earlier."""
        follows = self.same_word_mask().roll(1, 1)
        follows[:, 0] = False
        return follows

    def measure_shares(self, targets: Mapping[str, Bool[Tensor, "query key"]]) -> ScoresWithChance:
        """The share of each target, of every head; and of one that attends alike to all that it sees."""
        alike = self.uniform_attention()
        return {
            name: (
                torch.stack([self.attention_share(x, target) for x in self.patterns]),
                float(self.attention_share(alike, target)),
            )
            for name, target in targets.items()
        }

    def attention_share(
        self, attention: Float[Tensor, "batch head query key"], target: Bool[Tensor, "query key"]
    ) -> Float[Tensor, "head"]:
        """What goes to the target, of what does not go to the prefix, over the queries that have a target."""
        asked = attention[:, :, target.any(1)]
        return (asked * target[target.any(1)]).sum((0, 2, 3)) / (asked * (self.word_index >= 0)).sum((0, 2, 3))

    def measure_prefix_share(self) -> tuple[Float[Tensor, "layer head"], float]:
        """The share of all attention of words that goes to the prefix."""
        words = self.word_index >= 0
        shares = [x[:, :, words][..., ~words].sum(-1).mean((0, 2)) for x in (*self.patterns, self.uniform_attention())]
        return torch.stack(shares[:-1]), float(shares[-1])

    def uniform_attention(self) -> Float[Tensor, "batch head query key"]:
        """A pattern that attends alike to all that it sees."""
        query, key = self.query_and_key_indices()
        seen = (key <= query).to(self.patterns[0].dtype)
        return (seen / seen.sum(-1, keepdim=True))[None, None]
