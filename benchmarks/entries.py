"""Leaving out every cache entry of a prompt in one sweep, beside a loop: `python -m benchmarks.entries --model FOLDER`.

The loop is what one writes with hooks: for every entry (layer, kv head, position), a pass over the whole prompt whose
last query does not see it; or, sharing the past, one step behind a cache. It runs some entries and is multiplied.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import glmlens
from glmlens import Lens, Point, analysis
from glmlens.analysis.batch import PromptBatch
from glmlens.analysis.chunks import DecodingState

Entry = tuple[int, int, int]
TEXT = (
    "It was a warm day in the spring and the sun was shining over the small town by the river. People were walking in "
    "the streets. When Mary and John went to the store, John gave a drink to"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--some", type=int, default=12, help="entries that a loop runs; its time is multiplied")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    lens = glmlens.load(args.model, dtype="float32")
    tokens = lens.to_tokens(TEXT)
    entries = every(lens, tokens)
    some = entries[:: max(1, len(entries) // args.some)]
    memory, times = (
        DecodingState.from_batch(PromptBatch.from_prompt(lens, tokens)),
        dict[str, list[float]](sweep=[], steps=[], passes=[]),
    )
    for _ in range(args.rounds):
        times["sweep"].append(seconds(lambda: analysis.leave_one_out(lens, tokens)))
        times["steps"].append(seconds(lambda: [step(lens, memory, e) for e in some]) * len(entries) / len(some))
        times["passes"].append(seconds(lambda: [whole(lens, tokens, e) for e in some]) * len(entries) / len(some))
    found = analysis.leave_one_out(lens, tokens).kl
    for e in some:
        by_hand = (kl(lens(tokens), whole(lens, tokens, e)), kl(lens(tokens), step(lens, memory, e)))
        assert all(abs(found.values[e] - x) < 1e-4 for x in by_hand), (e, found.values[e], by_hand)
    ours = statistics.median(times["sweep"])
    print(
        f"{tokens.shape[1]} tokens, {len(entries):,} entries; medians of {args.rounds} rounds, {args.threads} threads"
    )
    for name, said in (("sweep", "one sweep"), ("steps", "a step for each"), ("passes", "a pass for each")):
        taken = statistics.median(times[name])
        print(f"{said:16} {taken:9.2f} s {taken / ours:8.1f} x")


def every(lens: Lens, tokens: torch.Tensor) -> list[Entry]:
    sizes = (range(lens.cfg.n_layers), range(lens.cfg.n_kv_heads), range(tokens.shape[1] - 1))
    return [(layer, kv, at) for layer in sizes[0] for kv in sizes[1] for at in sizes[2]]


def hidden(lens: Lens, entry: Entry) -> dict[str, glmlens.Hook]:
    layer, kv, at = entry
    heads = slice(kv * lens.cfg.n_groups, (kv + 1) * lens.cfg.n_groups)

    def hide(x: torch.Tensor, point: Point) -> torch.Tensor:
        x[:, heads, -1, at] = torch.finfo(x.dtype).min
        return x

    return {f"blocks.{layer}.attn.scores": hide}


def step(lens: Lens, memory: DecodingState, entry: Entry) -> torch.Tensor:
    return lens.run_with_hooks(memory.token[:, None], hidden(lens, entry), kv=memory.kv.fork(1))


def whole(lens: Lens, tokens: torch.Tensor, entry: Entry) -> torch.Tensor:
    return lens.run_with_hooks(tokens, hidden(lens, entry), logits_to_keep=1)


def kl(base: torch.Tensor, other: torch.Tensor) -> float:
    p, q = (x[0, -1].double().log_softmax(-1) for x in (base, other))
    return float((p.exp() * (p - q)).sum())


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
