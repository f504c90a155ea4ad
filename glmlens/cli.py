"""The command `glmlens`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmlens.config import CheckpointError
from glmlens.hooks import Point
from glmlens.lens import Lens, load

PROMPT = "When Mary and John went to the store, John gave a drink to"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="glmlens", description="Look inside GLM language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo_ = commands.add_parser("demo", help="complete a prompt, find an induction head, ablate it")
    demo_.add_argument("--model", required=True, metavar="PATH", help="a checkpoint folder or hub id")
    demo_.add_argument("--prompt", default=PROMPT)
    demo_.set_defaults(run=demo)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except CheckpointError as e:
        print(f"glmlens: {e}", file=sys.stderr)
        return 2
    return 0


def demo(args: argparse.Namespace) -> None:
    """Show what a checkpoint says to a prompt, which heads copy what came before, and that they do."""
    lens = load(args.model)
    print(lens)
    prompt = args.prompt if lens.tokenizer else torch.arange(2, min(16, lens.cfg.d_vocab))[None]
    print(f"\n> {prompt if lens.tokenizer else prompt.tolist()}")
    run = lens.generate(prompt, 12)
    print(f"  {run.text if lens.tokenizer else run.new_tokens.tolist()}")

    print("\nthe next token")
    probs = lens(prompt)[0, -1].float().softmax(-1)
    for p, i in zip(*(t.tolist() for t in probs.topk(5)), strict=True):
        print(f"  {p:6.1%}  {lens.to_string([i]) if lens.tokenizer else i!r}")

    heads = Heads.find(lens)
    print("\nheads, on random tokens said twice (by chance: below 0.05)")
    for what, scores in (("previous token", heads.previous), ("induction", heads.induction)):
        best = scores.flatten().topk(min(4, scores.numel()))
        named = [f"{i // lens.cfg.n_heads}.{i % lens.cfg.n_heads} {s:.2f}" for s, i in zip(*best, strict=True)]
        print(f"  {what:15}{'  '.join(named)}")

    layer, head = divmod(int(heads.induction.argmax()), lens.cfg.n_heads)

    def ablate(z: Tensor, point: Point) -> Tensor:
        z[:, :, head] = 0
        return z

    before, after = (
        heads.loss(lens(heads.tokens)),
        heads.loss(lens.run_with_hooks(heads.tokens, {f"blocks.{layer}.attn.z": ablate})),
    )
    print(f"\nwithout head {layer}.{head}, the loss on what is said for the second time goes from", end=" ")
    print(f"{before:.2f} to {after:.2f} nats per token")


@dataclass(frozen=True)
class Heads:
    """How much each head attends to the previous token, and to what followed the same token before.

    Scores are [layer, head], means over rows of random tokens r in `prefix r r` (Olsson et al. 2022, arXiv
    2209.11895, "Prefix matching").
    """

    tokens: Tensor
    length: int
    previous: Tensor
    induction: Tensor

    @staticmethod
    def find(lens: Lens, length: int = 30, rows: int = 3, seed: int = 0) -> "Heads":
        prefix = torch.tensor(lens.tokenizer.prefix if lens.tokenizer else (), dtype=torch.long)
        draw = torch.Generator().manual_seed(seed)
        ordinary = torch.tensor(lens.tokenizer.ordinary_ids() if lens.tokenizer else range(lens.cfg.d_vocab))
        said = ordinary[torch.randint(len(ordinary), (rows, length), generator=draw)]
        tokens = torch.cat([prefix.expand(rows, -1), said, said], 1).to(lens.device)
        _, acts = lens.run_with_cache(tokens, "attn.pattern", logits=False)
        pattern = torch.stack([acts["attn.pattern", i].float().mean(0) for i in range(lens.cfg.n_layers)])
        first = len(prefix)
        previous = pattern.diagonal(-1, -2, -1)[..., first:].mean(-1)
        induction = pattern.diagonal(1 - length, -2, -1)[..., first + 1 :].mean(-1)
        return Heads(tokens, length, previous, induction)

    def loss(self, logits: Tensor) -> float:
        """Nats per token of the second half."""
        said = self.tokens[:, -self.length :]
        before = logits[:, -self.length - 1 : -1].float().log_softmax(-1)
        return -float(before.gather(-1, said[..., None]).mean())
