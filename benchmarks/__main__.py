"""Compare glmlens with transformers and TransformerLens in one run: `python -m benchmarks --model FOLDER`."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors import safe_open

import glmlens

Job = Callable[[], Any]
OURS = ("glmlens eager", "glmlens sdpa")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint folder (float32 is taken)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-random", action="store_true", help="leave out the random 200 M model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads, float32; ", end=""
    )
    print(f"medians of {args.rounds} rounds that alternate between the contestants\n")
    if args.model:
        print_table(args.model.name, args.model, args.rounds)
    if not args.no_random:
        with tempfile.TemporaryDirectory() as folder:
            write_random_model(Path(folder))
            print_table("random, 12 layers, 200 M", Path(folder), args.rounds)


def write_random_model(folder: Path) -> None:
    """Write a GLM of 12 layers and 200 M parameters with random weights."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = transformers.GlmConfig(
        vocab_size=65536, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, pad_token_id=0, eos_token_id=[1],
        rope_parameters=rope,
    )  # fmt: skip
    transformers.GlmForCausalLM(config).save_pretrained(folder)


def time_jobs(jobs: dict[str, Job], rounds: int) -> dict[str, float]:
    """Return the median seconds of each job over rounds that run all jobs once, after a warm-up round."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    # alternate between the jobs, so that a slow moment of the machine hits all of them
    for i in range(rounds + 1):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            if i > 0:
                taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def print_row(what: str, seconds: dict[str, float], against: str, floor: float | None = None, unit: str = "s") -> None:
    """Print one row: every contestant's time, and its ratio to that of `against`."""
    times = "  ".join(f"{name} {s:.3f} {unit} ({s / seconds[against]:.2f})" for name, s in seconds.items())
    print(f"{what:34}{times}" + (f"  floor {floor:.3f}" if floor else ""), flush=True)


def load_bridge(path: Path) -> Any:
    """Return TransformerLens's bridge over transformers' eager model, or None where it is not installed."""
    try:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    except ImportError:
        return None
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(path, attn_implementation="eager", dtype=torch.float32).eval()
    return build_bridge_from_module(
        model, model.config.architectures[0], hf_config=model.config, tokenizer=None, dtype=torch.float32, device="cpu"
    )


def map_file(path: Path) -> None:
    """Map the file and read the tokenizer: the minimum that every loader does."""
    with safe_open(path / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            file.get_tensor(name)
    if (path / "tokenizer.json").exists():
        tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))


def load_tokenizer(path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(path) if (path / "tokenizer.json").exists() else None


def count_megabytes(tensors: Iterable[torch.Tensor]) -> float:
    """Return the memory of these tensors in MB, each storage counted once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values()) / 1e6


def list_linear_weights(lens: glmlens.Lens) -> list[torch.Tensor]:
    return [m.weight for m in lens.model.modules() if isinstance(m, torch.nn.Linear)]


@torch.no_grad()
def print_table(name: str, path: Path, rounds: int) -> None:
    """Time forward, recording, decoding, loading and memory of one checkpoint, and print a row for each."""
    print(f"## {name}")
    load = transformers.AutoModelForCausalLM.from_pretrained
    hf = {a: load(path, attn_implementation=a, dtype=torch.float32).eval() for a in ("sdpa", "eager")}
    ours = {a: glmlens.load(path, dtype="float32", attention=a) for a in ("eager", "sdpa")}
    bridge = load_bridge(path)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, ours["eager"].cfg.d_vocab - 5, (1, 256), generator=draw)
    weights = list_linear_weights(ours["eager"])

    inputs = [torch.randn(256, w.shape[1]) for w in weights]
    jobs: dict[str, Job] = {
        "glmlens eager": lambda: ours["eager"](tokens),
        "glmlens sdpa": lambda: ours["sdpa"](tokens),
        "transformers eager": lambda: hf["eager"](tokens),
        "transformers sdpa": lambda: hf["sdpa"](tokens),
        "floor": lambda: [x @ w.T for w, x in zip(weights, inputs, strict=True)],
    }
    if bridge:
        jobs["TransformerLens"] = lambda: bridge(tokens)
    seconds = time_jobs(jobs, rounds)
    floor = seconds.pop("floor")
    print_row("forward, 256 tokens", seconds, "transformers eager", floor)

    middle = ours["eager"].cfg.n_layers // 2
    jobs = {
        "glmlens forward": lambda: ours["eager"](tokens),
        "glmlens all": lambda: ours["eager"].run_with_cache(tokens),
        "glmlens one": lambda: ours["eager"].run_with_cache(tokens, f"blocks.{middle}.attn.pattern"),
    }
    if bridge:
        jobs["TransformerLens all"] = lambda: bridge.run_with_cache(tokens)
        jobs["TransformerLens one"] = lambda: bridge.run_with_cache(
            tokens, names_filter=f"blocks.{middle}.attn.hook_pattern"
        )
    recorded = ours["eager"].run_with_cache(tokens)[1]
    n_floats = int(count_megabytes(recorded.stored.values()) * 1e6 / 4)
    jobs["glmlens reading all"] = lambda: [recorded[name] for name in recorded]
    jobs["writing as much"] = lambda: torch.empty(n_floats).fill_(1)
    seconds = time_jobs(jobs, rounds)
    floor += seconds.pop("writing as much")  # the matrix products, and writing the recording to new memory
    print_row("everything recorded, one recorded", seconds, "glmlens forward", floor)
    compare_recordings(ours["eager"], bridge)

    prompt, n = tokens[:, :32], 64
    single = [torch.randn(1, w.shape[1]) for w in weights]
    plain = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False}
    jobs = {
        "glmlens sdpa": lambda: ours["sdpa"].generate(prompt, n, stop_ids=()),
        "glmlens hooked": lambda: ours["sdpa"].generate(prompt, n, stop_ids=(), hooks={"resid_post": lambda x, p: x}),
        "glmlens eager": lambda: ours["eager"].generate(prompt, n, stop_ids=()),
        "transformers sdpa": lambda: hf["sdpa"].generate(prompt, attention_mask=torch.ones_like(prompt), **plain),
        "transformers eager": lambda: hf["eager"].generate(prompt, attention_mask=torch.ones_like(prompt), **plain),
        "floor": lambda: [
            torch.nn.functional.linear(x, w) for _ in range(n) for w, x in zip(weights, single, strict=True)
        ],
    }
    if bridge:
        jobs["TransformerLens"] = lambda: bridge.generate(
            prompt, max_new_tokens=n, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
        )
    seconds = time_jobs(jobs, max(3, rounds // 2))
    floor = seconds.pop("floor")
    print_row(f"{n} tokens decoded after 32", seconds, "transformers sdpa", floor)

    jobs = {"glmlens": lambda: glmlens.load(path), "floor": lambda: map_file(path)}
    jobs["transformers"] = lambda: (load(path), load_tokenizer(path))
    if bridge:
        jobs["TransformerLens"] = lambda: load_bridge(path)
    seconds = time_jobs(jobs, 3)
    floor = seconds.pop("floor")
    print_row("load", seconds, "transformers", floor)
    compare_processes(path)
    print()


def compare_recordings(lens: glmlens.Lens, bridge: Any, pos: int = 512) -> None:
    """Print the memory of a recording of all points, each storage counted once, and the estimate of `check`."""
    tokens = torch.randint(5, lens.cfg.d_vocab - 5, (1, pos), generator=torch.Generator().manual_seed(1))
    acts = lens.run_with_cache(tokens)[1]
    megabytes = {
        "glmlens": count_megabytes(acts.stored.values()),
        "estimate of check": lens.check(tokens, "all").bytes / 1e6,
    }
    megabytes["if all were stored"] = sum(acts[name].nbytes for name in acts) / 1e6
    if bridge:
        megabytes["TransformerLens"] = count_megabytes(bridge.run_with_cache(tokens)[1].values())
    print_row(f"everything recorded, {pos} tokens", megabytes, "TransformerLens" if bridge else "glmlens", unit="MB")


def compare_processes(path: Path) -> None:
    """Print the time of an import and the peak memory of load and one forward, each in a process of its own."""
    where = json.dumps(str(path))
    forward = "(torch.arange(5, 21)[None])"
    codes = {
        "import": {
            "torch": "import torch",
            "glmlens": "import torch, glmlens",
            "transformers": "import torch; from transformers import GlmForCausalLM",
            "TransformerLens": "import torch, transformer_lens",
        },
        "peak": {
            "torch": "import torch",
            "glmlens": f"import torch, glmlens; glmlens.load({where}){forward}",
            "transformers": "import torch; from transformers import GlmForCausalLM; "
            f"GlmForCausalLM.from_pretrained({where}){forward}",
            "TransformerLens": "import torch, pathlib; from benchmarks.__main__ import load_bridge; "
            f"load_bridge(pathlib.Path({where})){forward}",
        },
    }
    # every process ends by printing its peak memory in MB
    end = "\nprint(int(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1]) * 1024 / 1e6)"
    medians: dict[str, dict[str, float]] = {}
    for what, each in codes.items():
        medians[what] = {}
        for name, code in each.items():
            taken = []
            for _ in range(3):
                begin = time.perf_counter()
                done = subprocess.run([sys.executable, "-c", code + end], capture_output=True, text=True, check=False)
                taken.append(time.perf_counter() - begin if what == "import" else float(done.stdout or "nan"))
            if done.returncode == 0:
                medians[what][name] = statistics.median(taken)
    print_row("import", medians["import"], "torch", medians["import"]["torch"])
    weights = sum(f.stat().st_size for f in path.glob("*.safetensors")) / 1e6
    print_row(
        "peak memory, load and a forward", medians["peak"], "torch", medians["peak"]["torch"] + weights, unit="MB"
    )


if __name__ == "__main__":
    main()
