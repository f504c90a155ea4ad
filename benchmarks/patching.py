"""Compare patching sweeps with TransformerLens and nnsight: `python -m benchmarks.patching --model FOLDER`.

The tools alternate and must give the same numbers. The floor is the least number of multiplications of the sweep,
divided by the rate at which this machine multiplies matrices of this model's shapes. `--nnsight PYTHON` is an
interpreter with nnsight, in an environment of its own because nnsight needs other versions.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import glmlens
from benchmarks.__main__ import list_linear_weights, load_bridge
from glmlens import patch

NAMES = [" Mary", " John", " Anna", " Paul"]
SHORT = ("When Mary and John went to the store, John gave a drink to", " Mary", " John")
# text before the prompts, for longer ones
STORY = (
    "It was a warm day in the spring and the sun was shining over the small town by the river. People were walking in "
    "the streets and children were playing in the park near the old school. "
)
SITES = {"resid_pre": ("resid_pre", ("layer", "pos")), "heads": ("attn.z", ("layer", "head"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="*", default=[14, 64])
    parser.add_argument("--sites", nargs="*", default=list(SITES))
    parser.add_argument("--nnsight", help="a Python interpreter with nnsight")
    parser.add_argument(
        "--part", type=int, default=1, help="the other tools run every n-th layer, and their time is multiplied"
    )
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.contestant:
        return serve(args.model)
    lens = glmlens.load(args.model, dtype="float32")
    bridge = load_bridge(args.model)
    print(f"torch {torch.__version__}, {args.threads} threads, float32; medians of {args.rounds} alternating rounds")
    for length in args.tokens:
        for kind in ("flip", "names"):
            pair = make_pair(lens, length, kind)
            for site in args.sites:
                compare_sweeps(args, lens, bridge, pair, site, f"{site}, {pair[0].shape[1]} tokens, {kind}")


def make_pair(lens: glmlens.Lens, length: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a pair of `length` tokens; `kind` "flip" changes the second subject, "names" changes all names."""
    text = SHORT[0]
    other = text.replace("John gave", "Mary gave") if kind == "flip" else text.replace("Mary and John", "Anna and Paul")
    clean, corrupt = lens.to_tokens(text), lens.to_tokens(other)
    if kind == "names":
        corrupt = lens.to_tokens(other.replace("John gave", "Paul gave"))
    missing = length - clean.shape[1]
    if missing > 0:
        story = lens.to_tokens(STORY * 4)[:, :missing]
        clean, corrupt = torch.cat([story, clean], 1), torch.cat([story, corrupt], 1)
        if kind == "names":  # differ from the first token on: no part of the prompt is shared
            corrupt[0, 0] = lens.to_tokens(" Later")[0, 0]
    return clean, corrupt


def compare_sweeps(args: Any, lens: glmlens.Lens, bridge: Any, pair: tuple, site: str, what: str) -> None:
    """Time one sweep by every tool, compare the numbers and print a row."""
    answers = (SHORT[1], SHORT[2])
    point, over = SITES[site]
    results: dict[str, Any] = {}

    def ours() -> None:
        results["glmlens"] = patch.sweep(
            lens, *pair, point, over=over, metric=answers, normalise=False, progress=False, direction="denoise"
        )

    jobs: dict[str, Callable[[], Any]] = {"glmlens": ours, "floor": lambda: measure_rate(lens)}
    if bridge:
        jobs["TransformerLens"] = lambda: results.update(
            TransformerLens=run_transformerlens_sweep(lens, bridge, pair, site, args.part)
        )
    peer = NnsightProcess(args, pair, site) if args.nnsight else None
    if peer:
        jobs["nnsight"] = lambda: results.update(nnsight=peer())
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    rates = []
    for i in range(args.rounds + 1):
        for name, job in jobs.items():
            if i == 0 and name not in ("glmlens", "floor"):
                continue  # the warm-up round is for glmlens alone: the others take long
            begin = time.perf_counter()
            result = job()
            if i > 0:
                taken[name].append(time.perf_counter() - begin)
            if name == "floor" and i > 0:
                rates.append(result)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    seconds.pop("floor")
    for name in ("TransformerLens", "nnsight"):
        if name in seconds:
            seconds[name] *= args.part
            difference = torch.from_numpy(results["glmlens"].values)[:: args.part] - results[name]
            assert float(difference.abs().max()) < 1e-3, (name, float(difference.abs().max()))
    speed = statistics.median(rates)
    cost = results["glmlens"].cost
    floor = cost.flops / speed
    times = "  ".join(f"{name} {s:.2f} s ({s / seconds['glmlens']:.1f})" for name, s in seconds.items())
    print(
        f"{what:34}{times}  floor {floor:.2f} s = {cost.flops / 1e9:.0f} GFLOP at {speed / 1e9:.0f} GFLOP/s; "
        f"glmlens takes {seconds['glmlens'] / floor:.2f} of that; {cost.unchanged} of {cost.unchanged + cost.cells} "
        "cells cannot change",
        flush=True,
    )
    if peer:
        peer.close()


def measure_rate(lens: glmlens.Lens) -> float:
    """Return multiplications and additions per second in this model's matrices, at the best batch size."""
    weights = list_linear_weights(lens)[:-1]  # of all layers, so that they come from memory and not from a CPU cache
    best = 0.0
    for rows in (512, 1024):
        inputs = {n: torch.randn(rows, n) for n in {w.shape[1] for w in weights}}
        for _ in range(2):
            begin = time.perf_counter()
            for w in weights:
                torch.nn.functional.linear(inputs[w.shape[1]], w)
            best = max(best, 2 * rows * sum(w.numel() for w in weights) / (time.perf_counter() - begin))
    return best


def run_transformerlens_sweep(lens: glmlens.Lens, bridge: Any, pair: tuple, site: str, part: int) -> torch.Tensor:
    """Run TransformerLens's own patching functions over every part-th layer; return [layer, pos or head]."""
    import pandas
    from transformer_lens import patching

    clean, corrupt = pair
    right, wrong = (lens.to_single_token(t) for t in SHORT[1:])
    _, cache = bridge.run_with_cache(clean)
    layers = range(0, lens.cfg.n_layers, part)
    if site == "resid_pre":
        setter, name = patching.layer_pos_patch_setter, "resid_pre"
        size, axis = clean.shape[1], "pos"
    else:
        setter, name = patching.layer_head_vector_patch_setter, "z"
        size, axis = lens.cfg.n_heads, "head"
    grid = pandas.DataFrame([(i, j) for i in layers for j in range(size)], columns=["layer", axis])

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, right] - logits[0, -1, wrong]

    out = patching.generic_activation_patch(bridge, corrupt, cache, metric, setter, name, index_df=grid)
    return out.reshape(len(layers), size)


class NnsightProcess:
    """A process with nnsight that runs sweeps on request."""

    def __init__(self, args: Any, pair: tuple, site: str):
        command = [args.nnsight, "-m", "benchmarks.patching", "--contestant", "nnsight", "--model", str(args.model)]
        self.process = subprocess.Popen(
            [*command, "--threads", str(args.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.request = {"clean": pair[0].tolist(), "corrupt": pair[1].tolist(), "site": site, "part": args.part}

    def __call__(self) -> torch.Tensor:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(self.request), file=self.process.stdin, flush=True)
        while not (line := self.process.stdout.readline()).startswith("["):
            if not line:
                raise RuntimeError("nnsight ended")
        return torch.tensor(json.loads(line))

    def close(self) -> None:
        self.process.kill()


def serve(path: Path) -> None:
    """Run in the process with nnsight: read requests as lines of JSON, print grids."""
    import transformers
    from nnsight import LanguageModel  # pyright: ignore[reportMissingImports]

    load = transformers.AutoModelForCausalLM.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = LanguageModel(load(path, attn_implementation="eager", dtype=torch.float32).eval(), tokenizer=tokenizer)
    right, wrong = (tokenizer(t, add_special_tokens=False).input_ids[-1] for t in SHORT[1:])
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run_nnsight_sweep(model, request, right, wrong).tolist()), flush=True)


def run_nnsight_sweep(model: Any, request: dict, right: int, wrong: int) -> torch.Tensor:
    """Run every cell of a layer as an invoke of one trace, which is one batch; return [layer, pos or head]."""
    clean, corrupt = torch.tensor(request["clean"]), torch.tensor(request["corrupt"])
    layers = range(0, len(model.model.layers), request["part"])
    resid = request["site"] == "resid_pre"
    width = model.config.head_dim
    size = clean.shape[1] if resid else model.config.num_attention_heads
    values = {}
    with model.trace(clean):
        for i in layers:
            layer = model.model.layers[i]
            values[i] = (layer.input if resid else layer.self_attn.o_proj.input).save()
    rows = []
    for i in layers:
        cells = [None] * size
        with model.trace() as tracer:
            for j in range(size):
                with tracer.invoke(corrupt):
                    if resid:
                        model.model.layers[i].input[:, j] = values[i][:, j]
                    else:
                        here = slice(j * width, (j + 1) * width)
                        model.model.layers[i].self_attn.o_proj.input[:, :, here] = values[i][:, :, here]
                    logits = model.lm_head.output[:, -1]
                    cells[j] = (logits[:, right] - logits[:, wrong]).save()
        rows.append(torch.stack([torch.as_tensor(f).reshape(()) for f in cells]))
    return torch.stack(rows)


if __name__ == "__main__":
    main()
