"""Write, load and run a checkpoint with the shapes of GLM-4-9B: `python -m benchmarks.size`.

The weights are random, in bfloat16 and in shards, at a quarter of the depth. A process of its own loads them, records
one point of a forward and generates three tokens. Peak memory is the kernel's high-water mark of that process (VmHWM),
which includes every touched page of the mapped file. Its private memory without the file is RssAnon, sampled a hundred
times a second. `--depth 40` is the whole model; `--scale 4` divides every width by 4.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import glmlens
from glmlens.config import GLMConfig
from glmlens.loading.checkpoint import build_meta_model, get_expected_shape, map_checkpoint_tensors

POINT = "blocks.{i}.resid_post"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--shard", type=float, default=2.5, help="GB of a file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        return print(json.dumps(measure(args.run, args.tokens, args.threads)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.perf_counter()
        weights = write_checkpoint(folder, make_config(args.depth, args.scale), int(args.shard * 1e9))
        print(f"{weights / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} files, "
              f"written in {time.perf_counter() - begin:.0f} s", flush=True)  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.size", "--run", name]
        options = ["--tokens", str(args.tokens), "--threads", str(args.threads)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    for what in ("load", "forward", "generate"):
        print(f"{what:9}{measured[what]['seconds']:8.1f} s   peak {measured[what]['peak'] / 1e9:.2f} GB "
              f"({measured[what]['peak'] / weights:.3f} of the weights; "
              f"private {measured[what]['own'] / 1e9:.2f} GB)")  # fmt: skip
    print(json.dumps(measured | {"weights": weights}))


def make_config(depth: int, scale: int) -> dict[str, Any]:
    """Return the config.json of GLM-4-9B with another depth, and every width except the head's divided by `scale`."""
    return {
        "model_type": "glm", "architectures": ["GlmForCausalLM"], "dtype": "bfloat16", "head_dim": 128,
        "vocab_size": 151552 // scale, "hidden_size": 4096 // scale, "intermediate_size": 13696 // scale,
        "num_hidden_layers": depth, "num_attention_heads": 32 // scale, "num_key_value_heads": 2,
        "max_position_embeddings": 8192, "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0,
        "eos_token_id": [1], "pad_token_id": 0,
    }  # fmt: skip


def write_checkpoint(folder: Path, raw: dict[str, Any], shard_bytes: int) -> int:
    """Write random weights of these shapes, holding one shard in memory at a time; return their bytes."""
    (folder / "config.json").write_text(json.dumps(raw))
    model = build_meta_model(GLMConfig.from_dict(raw), "eager", torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = {
        name: 2 * torch.Size(get_expected_shape(parts, model)).numel()
        for name, parts in map_checkpoint_tensors(model).items()
    }
    for name, parts in map_checkpoint_tensors(model).items():
        if shards[-1] and sum(size[n] for n in shards[-1]) + size[name] > shard_bytes:
            shards.append({})
        shards[-1][name] = get_expected_shape(parts, model)
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file({name: draw_weight(name, shape, draw) for name, shape in shard.items()}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(size.values())


def draw_weight(name: str, shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    """Return ones for a norm, else normal numbers with a standard deviation of 0.02."""
    x = torch.empty(shape, dtype=torch.bfloat16)
    return x.fill_(1) if "norm" in name else x.normal_(std=0.02, generator=draw)


def measure(folder: Path, tokens: int, threads: int) -> dict[str, Any]:
    """Load, run a forward with one recorded point, generate three tokens; return seconds and peak memory of each."""
    torch.set_num_threads(threads)
    own = PrivateMemory()
    measured: dict[str, Any] = {"import": {"seconds": 0.0, "peak": read_status("VmHWM"), "own": own.peak()}}

    def timed(what: str, job: Any) -> Any:
        begin = time.perf_counter()
        result = job()
        measured[what] = {"seconds": time.perf_counter() - begin, "peak": read_status("VmHWM"), "own": own.peak()}
        return result

    lens = timed("load", lambda: glmlens.load(folder))
    prompt = torch.randint(2, lens.cfg.d_vocab, (1, tokens), generator=torch.Generator().manual_seed(1))
    point = POINT.format(i=lens.cfg.n_layers // 2)
    logits, acts = timed("forward", lambda: lens.run_with_cache(prompt, point))
    assert bool(torch.isfinite(logits).all())
    assert acts[point].shape == (1, tokens, lens.cfg.d_model)
    run = timed("generate", lambda: lens.generate(prompt, 3, stop_ids=()))
    assert run.tokens.shape == (1, tokens + 3)
    own.running = False
    return measured


class PrivateMemory(threading.Thread):
    """A thread that samples RssAnon until `running` is set to False."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.running = True
        self.highest = 0
        self.start()

    def run(self) -> None:
        while self.running:
            self.peak()
            time.sleep(0.01)

    def peak(self) -> int:
        self.highest = max(self.highest, read_status("RssAnon"))
        return self.highest


def read_status(name: str) -> int:
    """Return the bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


if __name__ == "__main__":
    main()
