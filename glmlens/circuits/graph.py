"""A GLM as a graph: components that write to the residual stream, components that read it, edges between them.

Writers, in the order in which they write: the embedding, and of every layer its heads and its MLP. Readers: of every
layer the query of each head, the key and the value of each group, and the MLP; last the logits. A reader reads all that
has been written before it, so its edges come from the first n writers, and n alone describes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from glmlens.config import GLMConfig

Edge = tuple[str, str]


@dataclass(frozen=True)
class Graph:
    """Writers, readers and edges of a GLM with this many layers, heads and groups (native grouped queries)."""

    n_layers: int
    n_heads: int
    n_kv_heads: int

    @staticmethod
    def from_config(cfg: GLMConfig) -> "Graph":
        """Return the graph of a model with this configuration."""
        return Graph(cfg.n_layers, cfg.n_heads, cfg.n_kv_heads)

    @cached_property
    def writers(self) -> list[str]:
        """Names of writers in the order in which they write: embed, 0.head0, ..., 0.mlp, 1.head0, ..."""
        layers = ([*(f"{i}.head{h}" for h in range(self.n_heads)), f"{i}.mlp"] for i in range(self.n_layers))
        return ["embed", *(name for layer in layers for name in layer)]

    @cached_property
    def readers(self) -> list[str]:
        """Names of readers in order: 0.q0, ..., 0.k0, ..., 0.v0, ..., 0.mlp, 1.q0, ..., logits."""
        return [name for i in range(self.n_layers) for name in (*self.attention_readers(i), f"{i}.mlp")] + ["logits"]

    def attention_readers(self, layer: int) -> list[str]:
        """Return the readers of a layer's attention: queries by head, keys and values by group."""
        kinds = (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads))
        return [f"{layer}.{kind}{n}" for kind, many in kinds for n in range(many)]

    @property
    def readers_per_layer(self) -> int:
        """How many readers one layer has."""
        return self.n_heads + 2 * self.n_kv_heads + 1

    def attention_reader_slice(self, layer: int) -> slice:
        """Return the rows of a layer's attention readers among all readers; the row of its MLP follows."""
        return slice(layer * self.readers_per_layer, (layer + 1) * self.readers_per_layer - 1)

    def n_writers_before(self, layer: int) -> int:
        """Return how many writers have written when a layer starts."""
        return 1 + layer * (self.n_heads + 1)

    @cached_property
    def n_edges(self) -> int:
        return sum(self.count_writers_by_reader())

    def count_writers_by_reader(self) -> Iterator[int]:
        """Yield for every reader from how many of the first writers it has edges."""
        for i in range(self.n_layers):
            yield from [self.n_writers_before(i)] * (self.readers_per_layer - 1)
            yield self.n_writers_before(i) + self.n_heads
        yield self.n_writers_before(self.n_layers)

    @cached_property
    def mask(self) -> Bool[Tensor, "reader writer"]:
        """True where there is an edge."""
        reads = torch.tensor(list(self.count_writers_by_reader()))
        return torch.arange(len(self.writers)) < reads[:, None]

    def edges(self) -> Iterator[Edge]:
        """Yield every edge as (writer, reader)."""
        for reader, many in zip(self.readers, self.count_writers_by_reader(), strict=True):
            for writer in self.writers[:many]:
                yield writer, reader

    def writer_input_mask(self) -> Bool[Tensor, "writer reader"]:
        """Return which readers a writer is computed from: a head from its query and its group's key and value."""
        mask = torch.zeros(len(self.writers), len(self.readers), dtype=torch.bool)
        group, at = self.n_heads // self.n_kv_heads, {name: i for i, name in enumerate(self.readers)}
        for w, name in enumerate(self.writers[1:], 1):
            layer, part = name.split(".")
            if part == "mlp":
                mask[w, at[name]] = True
            else:
                h = int(part.removeprefix("head"))
                mask[w, [at[f"{layer}.q{h}"], at[f"{layer}.k{h // group}"], at[f"{layer}.v{h // group}"]]] = True
        return mask
