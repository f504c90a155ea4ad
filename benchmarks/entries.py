"""Remove every cache entry of a prompt in one sweep, and in a loop: `python -m benchmarks.entries --model FOLDER`.

The loop uses hooks: for every entry (layer, KV head, position), a forward over the whole prompt whose last query cannot
attend to it; or, with a shared KV cache, one decoding step. It runs some entries, and its time is multiplied.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

import glmlens
from glmlens import Lens, Point, analysis
from glmlens.analysis.chunked_runs import DecodingState
from glmlens.analysis.prompt_batch import PromptBatch

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
    entries = list_entries(lens, tokens)
    some = entries[:: max(1, len(entries) // args.some)]
    state = DecodingState.from_batch(PromptBatch.from_prompt(lens, tokens))
    times: dict[str, list[float]] = {"sweep": [], "steps": [], "passes": []}
    for _ in range(args.rounds):
        scale = len(entries) / len(some)
        times["sweep"].append(measure_seconds(lambda: analysis.leave_one_out(lens, tokens)))
        times["steps"].append(scale * measure_seconds(lambda: [run_step(lens, state, e) for e in some]))
        times["passes"].append(scale * measure_seconds(lambda: [run_prompt(lens, tokens, e) for e in some]))
    # the loops must give the same numbers as the sweep
    swept = analysis.leave_one_out(lens, tokens).kl
    for e in some:
        looped = [kl(lens(tokens), x) for x in (run_prompt(lens, tokens, e), run_step(lens, state, e))]
        assert all(abs(swept.values[e] - x) < 1e-4 for x in looped), (e, swept.values[e], looped)
    ours = statistics.median(times["sweep"])
    print(
        f"{tokens.shape[1]} tokens, {len(entries):,} entries; medians of {args.rounds} rounds, {args.threads} threads"
    )
    titles = {"sweep": "one sweep", "steps": "one decoding step each", "passes": "one forward each"}
    for name, title in titles.items():
        taken = statistics.median(times[name])
        print(f"{title:22} {taken:9.2f} s {taken / ours:8.1f} x")


def list_entries(lens: Lens, tokens: torch.Tensor) -> list[Entry]:
    """Return (layer, KV head, position) of every entry before the last token."""
    layers, heads, positions = range(lens.cfg.n_layers), range(lens.cfg.n_kv_heads), range(tokens.shape[1] - 1)
    return list(product(layers, heads, positions))


def hide_entry(lens: Lens, entry: Entry) -> dict[str, glmlens.Hook]:
    """Return a hook that masks the scores of the last query at one entry."""
    layer, kv, position = entry
    heads = slice(kv * lens.cfg.n_groups, (kv + 1) * lens.cfg.n_groups)

    def hide(x: torch.Tensor, point: Point) -> torch.Tensor:
        x[:, heads, -1, position] = torch.finfo(x.dtype).min
        return x

    return {f"blocks.{layer}.attn.scores": hide}


def run_step(lens: Lens, state: DecodingState, entry: Entry) -> torch.Tensor:
    """Run one decoding step that cannot attend to an entry."""
    return lens.run_with_hooks(state.token[:, None], hide_entry(lens, entry), kv=state.kv.fork(1))


def run_prompt(lens: Lens, tokens: torch.Tensor, entry: Entry) -> torch.Tensor:
    """Run the whole prompt with its last query unable to attend to an entry."""
    return lens.run_with_hooks(tokens, hide_entry(lens, entry), logits_to_keep=1)


def kl(base: torch.Tensor, other: torch.Tensor) -> float:
    """Return KL(base ‖ other) of the next token in nats."""
    p, q = (x[0, -1].double().log_softmax(-1) for x in (base, other))
    return float((p.exp() * (p - q)).sum())


def measure_seconds(run: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
