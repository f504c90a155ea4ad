"""The command `glmlens`."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    command = commands.add_parser("demo", help="complete a prompt, find an induction head, ablate it, write a report")
    command.add_argument("--model", metavar="PATH", help="a checkpoint folder or hub id (default: the model inside)")
    command.add_argument("--prompt", default=PROMPT)
    command.add_argument("--out", type=Path, metavar="DIR", help="where the report goes (default: a temporary folder)")
    command.set_defaults(run=demo)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except CheckpointError as e:
        print(f"glmlens: {e}", file=sys.stderr)
        return 2
    return 0


def demo(args: argparse.Namespace) -> None:
    """Show what a model says to a prompt, which heads copy what came before, and that they do."""
    from glmlens import plot
    from glmlens.report import save_html

    lens, said = load(args.model), []

    def say(text: str) -> None:
        said.append(text)
        print(text, flush=True)

    say(repr(lens))
    if lens.tokenizer is None and args.prompt != PROMPT:
        raise CheckpointError(f"{args.model}: without a tokenizer there is nothing to read --prompt with")
    prompt = args.prompt if lens.tokenizer else torch.arange(2, min(16, lens.cfg.d_vocab))[None]
    run = lens.generate(prompt, 12)
    shown = prompt if isinstance(prompt, str) else prompt.tolist()
    said_next = run.text.replace("\n", "↵") if isinstance(run.text, str) else run.new_tokens.tolist()
    say(f"\n> {shown}\n  {said_next}")

    probs = lens(prompt)[0, -1].float().softmax(-1).topk(5)
    top = [
        f"  {p:6.1%}  {label_of(lens, i)}" for p, i in zip(probs.values.tolist(), probs.indices.tolist(), strict=True)
    ]
    say("\n".join(["\nthe next token", *top]))

    heads = Heads.find(lens, words_for(lens))
    say(f"\nheads, on random words said twice (by chance: {heads.chance:.2f})")
    for what, scores in (("previous token", heads.previous), ("induction", heads.induction)):
        best = scores.flatten().topk(min(4, scores.numel()))
        named = [f"{i // lens.cfg.n_heads}.{i % lens.cfg.n_heads} {s:.2f}" for s, i in zip(*best, strict=True)]
        say(f"  {what:15}{'  '.join(named)}")

    layer, head = divmod(int(heads.induction.argmax()), lens.cfg.n_heads)

    def ablate(z: Tensor, point: Point) -> Tensor:
        z[:, :, head] = 0
        return z

    before = heads.loss(lens(heads.tokens))
    after = heads.loss(lens.run_with_hooks(heads.tokens, {f"blocks.{layer}.attn.z": ablate}))
    say(
        f"\nwithout head {layer}.{head}, the loss on what is said for the second time goes from {before:.2f} "
        f"to {after:.2f} nats per token"
    )

    row = heads.tokens[:1]
    _, acts = lens.run_with_cache(row, f"blocks.{layer}.attn.pattern", logits=False)
    pattern = acts["attn.pattern", layer][0, head].float().numpy()
    figures = [
        plot.head_scores(heads.induction.numpy(), "Induction score of every head: random words said twice"),
        plot.attention_pattern(pattern, lens.to_labels(row, 12), f"Head {layer}.{head} on random words said twice"),
    ]
    out = args.out or Path(tempfile.mkdtemp(prefix="glmlens-"))
    path = save_html(out / "glmlens-demo.html", "glmlens demo", ["\n".join(said), *figures])
    print(f"\nthe report, with both figures: {path}")
    print("to go on in a notebook: pip install jupyterlab && jupyter lab")
    print("and in its first cell: import glmlens; lens = glmlens.load()")


def words_for(lens: Lens) -> list[int]:
    """Ids of words to repeat at random."""
    if lens.tokenizer is None:
        return list(range(lens.cfg.d_vocab))
    return lens.tokenizer.word_ids()


def label_of(lens: Lens, i: int) -> str:
    return repr(lens.to_string([i])) if lens.tokenizer else str(i)


@dataclass(frozen=True)
class Heads:
    """How much each head attends to the previous token, and to what followed the same token before.

    Scores are [layer, head], means over rows of random words r in `prefix r r` (Olsson et al. 2022, arXiv
    2209.11895, "Prefix matching"). `chance` is the induction score of a head that attends alike to all it sees.
    """

    tokens: Tensor
    length: int
    previous: Tensor
    induction: Tensor
    chance: float

    @staticmethod
    def find(lens: Lens, words: Sequence[int], length: int = 20, rows: int = 4, seed: int = 0) -> "Heads":
        """The scores on rows of random words, of these ids."""
        prefix = torch.tensor(lens.tokenizer.prefix if lens.tokenizer else (), dtype=torch.long)
        draw = torch.Generator().manual_seed(seed)
        ordinary = torch.tensor(words)
        said = torch.stack([ordinary[torch.randperm(len(ordinary), generator=draw)[:length]] for _ in range(rows)])
        tokens = torch.cat([prefix.expand(rows, -1), said, said], 1).to(lens.device)
        _, acts = lens.run_with_cache(tokens, "attn.pattern", logits=False)
        pattern = torch.stack([acts["attn.pattern", i].float().mean(0) for i in range(lens.cfg.n_layers)]).cpu()
        first = len(prefix)
        previous = pattern.diagonal(-1, -2, -1)[..., first:].mean(-1)
        induction = pattern.diagonal(1 - length, -2, -1)[..., first + 1 :].mean(-1)
        chance = float((1 / torch.arange(first + length + 1, tokens.shape[1] + 1)).mean())
        return Heads(tokens, length, previous, induction, chance)

    def loss(self, logits: Tensor) -> float:
        """Nats per token of the second half."""
        said = self.tokens[:, -self.length :]
        before = logits[:, -self.length - 1 : -1].float().log_softmax(-1)
        return -float(before.gather(-1, said[..., None]).mean())
