"""Patching sweeps beside TransformerLens's and nnsight's: `python -m benchmarks.patching --model FOLDER`.

The same grid and the same numbers (checked), in turns. The floor is what multiplications the sweep needs at the least,
over the rate at which this machine multiplies matrices of this model's shapes; `--nnsight PYTHON` names an interpreter
that has nnsight, where it would disturb other versions.
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
from benchmarks.__main__ import linears, theirs
from glmlens import patch

NAMES = [" Mary", " John", " Anna", " Paul"]
SHORT = ("When Mary and John went to the store, John gave a drink to", " Mary", " John")
# the same question with a story before it, and the pair that differs from the first name on
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
    parser.add_argument("--nnsight", help="a python that has nnsight")
    parser.add_argument("--part", type=int, default=1, help="others run every n-th layer, and their time is multiplied")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.contestant:
        return serve(args.model)
    lens = glmlens.load(args.model, dtype="float32")
    bridge = theirs(args.model)
    print(f"torch {torch.__version__}, {args.threads} threads, float32; medians of {args.rounds} rounds in turns")
    for length in args.tokens:
        for kind in ("flip", "names"):
            pair = prompts(lens, length, kind)
            for site in args.sites:
                table(args, lens, bridge, pair, site, f"{site}, {pair[0].shape[1]} tokens, {kind}")


def prompts(lens: glmlens.Lens, length: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair of so many tokens: "flip" differs in the second subject alone, "names" from the first name on."""
    text = SHORT[0]
    other = text.replace("John gave", "Mary gave") if kind == "flip" else text.replace("Mary and John", "Anna and Paul")
    clean, corrupt = lens.to_tokens(text), lens.to_tokens(other)
    if kind == "names":
        corrupt = lens.to_tokens(other.replace("John gave", "Paul gave"))
    more = length - clean.shape[1]
    if more > 0:
        story = lens.to_tokens(STORY * 4)[:, :more]
        start = 0 if kind == "flip" else None
        clean, corrupt = torch.cat([story, clean], 1), torch.cat([story, corrupt], 1)
        if start is None:  # from the first token on
            corrupt[0, 0] = lens.to_tokens(" Later")[0, 0]
    return clean, corrupt


def table(args: Any, lens: glmlens.Lens, bridge: Any, pair: tuple, site: str, what: str) -> None:
    answers = (SHORT[1], SHORT[2])
    point, over = SITES[site]
    found: dict[str, Any] = {}

    def ours() -> None:
        found["glmlens"] = patch.sweep(
            lens, *pair, point, over=over, metric=answers, normalise=False, progress=False, direction="denoise"
        )

    jobs: dict[str, Callable[[], Any]] = {"glmlens": ours, "floor": lambda: rate(lens)}
    if bridge:
        jobs["TransformerLens"] = lambda: found.update(TransformerLens=tl_sweep(lens, bridge, pair, site, args.part))
    peer = Peer(args, pair, site) if args.nnsight else None
    if peer:
        jobs["nnsight"] = lambda: found.update(nnsight=peer())
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    rates = []
    for i in range(args.rounds + 1):
        for name, job in jobs.items():
            if i == 0 and name not in ("glmlens", "floor"):
                continue  # a round that does not count: theirs are long, and have nothing to warm up but memory
            begin = time.perf_counter()
            said = job()
            if i:
                taken[name].append(time.perf_counter() - begin)
            if name == "floor" and i:
                rates.append(said)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    seconds.pop("floor")
    for name in ("TransformerLens", "nnsight"):
        if name in seconds:
            seconds[name] *= args.part
            difference = torch.from_numpy(found["glmlens"].values)[:: args.part] - found[name]
            assert float(difference.abs().max()) < 1e-3, (name, float(difference.abs().max()))
    speed, cost = statistics.median(rates), found["glmlens"].cost
    floor = cost.flops / speed
    said = "  ".join(f"{name} {s:.2f} s ({s / seconds['glmlens']:.1f})" for name, s in seconds.items())
    print(
        f"{what:34}{said}  floor {floor:.2f} s = {cost.flops / 1e9:.0f} GFLOP at {speed / 1e9:.0f} GFLOP/s; "
        f"glmlens is {seconds['glmlens'] / floor:.2f} of it; {cost.unchanged} of {cost.unchanged + cost.cells} "
        "cells cannot differ",
        flush=True,
    )
    if peer:
        peer.close()


def rate(lens: glmlens.Lens) -> float:
    """Multiplications and additions per second in this model's matrices, at the batch that suits them best."""
    weights, best = linears(lens)[:-1], 0.0  # of all layers, as they come from memory
    for rows in (512, 1024):
        inputs = {n: torch.randn(rows, n) for n in {w.shape[1] for w in weights}}
        for _ in range(2):
            begin = time.perf_counter()
            for w in weights:
                torch.nn.functional.linear(inputs[w.shape[1]], w)
            best = max(best, 2 * rows * sum(w.numel() for w in weights) / (time.perf_counter() - begin))
    return best


def tl_sweep(lens: glmlens.Lens, bridge: Any, pair: tuple, site: str, part: int) -> torch.Tensor:
    """TransformerLens's own functions over every part-th layer."""
    import pandas
    from transformer_lens import patching

    clean, corrupt = pair
    right, wrong = (lens.to_single_token(t) for t in SHORT[1:])
    _, cache = bridge.run_with_cache(clean)
    layers = range(0, lens.cfg.n_layers, part)
    if site == "resid_pre":
        fn, setter, name = patching.generic_activation_patch, patching.layer_pos_patch_setter, "resid_pre"
        many, axis = clean.shape[1], "pos"
    else:
        fn, setter, name = patching.generic_activation_patch, patching.layer_head_vector_patch_setter, "z"
        many, axis = lens.cfg.n_heads, "head"
    grid = pandas.DataFrame([(i, j) for i in layers for j in range(many)], columns=["layer", axis])
    out = fn(
        bridge, corrupt, cache, lambda logits: logits[0, -1, right] - logits[0, -1, wrong], setter, name, index_df=grid
    )
    return out.reshape(len(layers), many)


class Peer:
    """nnsight in a process of its own, which answers sweeps."""

    def __init__(self, args: Any, pair: tuple, site: str):
        command = [args.nnsight, "-m", "benchmarks.patching", "--contestant", "nnsight", "--model", str(args.model)]
        self.process = subprocess.Popen(
            [*command, "--threads", str(args.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.asked = {"clean": pair[0].tolist(), "corrupt": pair[1].tolist(), "site": site, "part": args.part}

    def __call__(self) -> torch.Tensor:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(self.asked), file=self.process.stdin, flush=True)
        while not (line := self.process.stdout.readline()).startswith("["):
            if not line:
                raise RuntimeError("nnsight ended")
        return torch.tensor(json.loads(line))

    def close(self) -> None:
        self.process.kill()


def serve(path: Path) -> None:
    """nnsight's side: a line of JSON in, a grid out."""
    import transformers
    from nnsight import LanguageModel  # pyright: ignore[reportMissingImports]

    load = transformers.AutoModelForCausalLM.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = LanguageModel(load(path, attn_implementation="eager", dtype=torch.float32).eval(), tokenizer=tokenizer)
    right, wrong = (tokenizer(t, add_special_tokens=False).input_ids[-1] for t in SHORT[1:])
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(nnsight_sweep(model, asked, right, wrong).tolist()), flush=True)


def nnsight_sweep(model: Any, asked: dict, right: int, wrong: int) -> torch.Tensor:
    """Every cell of a layer as an invoke of one trace, which nnsight runs as one batch."""
    clean, corrupt = torch.tensor(asked["clean"]), torch.tensor(asked["corrupt"])
    layers = range(0, len(model.model.layers), asked["part"])
    resid = asked["site"] == "resid_pre"
    width = model.config.head_dim
    many = clean.shape[1] if resid else model.config.num_attention_heads
    values = {}
    with model.trace(clean):
        for i in layers:
            layer = model.model.layers[i]
            values[i] = (layer.input if resid else layer.self_attn.o_proj.input).save()
    rows = []
    for i in layers:
        found = [None] * many
        with model.trace() as tracer:
            for j in range(many):
                with tracer.invoke(corrupt):
                    if resid:
                        model.model.layers[i].input[:, j] = values[i][:, j]
                    else:
                        here = slice(j * width, (j + 1) * width)
                        model.model.layers[i].self_attn.o_proj.input[:, :, here] = values[i][:, :, here]
                    logits = model.lm_head.output[:, -1]
                    found[j] = (logits[:, right] - logits[:, wrong]).save()
        rows.append(torch.stack([torch.as_tensor(f).reshape(()) for f in found]))
    return torch.stack(rows)


if __name__ == "__main__":
    main()
