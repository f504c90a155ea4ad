"""Measure bytes and seconds of views in a real JupyterLab: `python -m benchmarks.views [--circuitsvis FOLDER]`.

Bytes are those of the kernel's messages that the page receives; seconds are from the start of the cell until the view
is drawn. CircuitsVis is installed in a folder of its own without its dependencies, which would bring another torch:

    pip install --no-deps --target FOLDER circuitsvis importlib_metadata zipp lazy-importer
"""

import argparse
import json
import time

from tests.lab import Lab

LENS = """
import torch, glmlens
from glmlens.model import GLM
from glmlens.widgets import AttentionExplorer
raw = dict(model_type="glm", vocab_size=1000, hidden_size=256, intermediate_size=64, num_hidden_layers=1,
           num_attention_heads=32, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, pad_token_id=0,
           eos_token_id=[1], rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))
torch.manual_seed(0)
model = GLM(glmlens.GLMConfig.from_dict(raw), "eager")
with torch.no_grad():
    for name, p in model.named_parameters():
        p.copy_(torch.randn_like(p) * 0.2 + ("ln" in name))
lens = glmlens.Lens(model)
def prompt(n):
    return torch.randint(5, 999, (1, n), generator=torch.Generator().manual_seed(n))
"""
THEIRS = """
import sys
sys.path.append({folder!r})
from circuitsvis.attention import attention_heads
from circuitsvis.utils import render
render.internet_on = lambda: False
def theirs(n):
    _, acts = lens.run_with_cache(prompt(n), "attn.pattern")
    return attention_heads(acts["attn.pattern", 0][0], lens.to_labels(prompt(n)))
"""
DRAWN = "document.querySelector('.jp-OutputArea .glmlens-heads[data-drawn]')"
THEIRS_DRAWN = "document.querySelectorAll('.jp-OutputArea :is(canvas, img)').length >= 32"
FIGURE_DRAWN = "document.querySelector('.jp-OutputArea .heatmaplayer image')"


class CountingLab(Lab):
    """A JupyterLab that counts the bytes that the page receives from the kernel."""

    received = 0

    def note(self, method, params):
        if method == "Network.webSocketFrameReceived":
            frame = params["response"]
            binary = frame["opcode"] == 2
            self.received += len(frame["payloadData"]) * 3 // 4 if binary else len(frame["payloadData"])
        super().note(method, params)

    def measure_cell(self, source, drawn):
        """Run a cell; return the bytes and seconds until it is drawn."""
        self.received = 0
        begin = time.perf_counter()
        self.cell(source)
        self.wait(drawn)
        return self.received, time.perf_counter() - begin


def measure_first_figures():
    """Measure the first figure and the first explorer of a fresh kernel, including imports."""
    load = "import glmlens\nlens = glmlens.load(dtype='float32')\nprompt = 'Mary and John went to the store'\n"
    figure = "from glmlens import analysis, plot\nplot.logit_lens(analysis.logit_lens(lens, prompt))"
    explorer = "from glmlens.widgets import AttentionExplorer\nAttentionExplorer(lens, prompt)"
    for name, code, drawn in (("figure", figure, FIGURE_DRAWN), ("AttentionExplorer", explorer, DRAWN)):
        lab = CountingLab()
        size, seconds = lab.measure_cell(load + code, drawn)
        print(f"first {name} in a fresh kernel: {seconds:.1f} s, {size / 1e3:,.0f} kB", flush=True)
        lab.close()


def measure_long_pattern():
    """Measure one head's pattern of 4,096 tokens, in a kernel and a page that have drawn a figure before."""
    lab = CountingLab()
    lab.cell("import torch\nfrom glmlens import plot\nplot.attention_pattern(torch.eye(9))")
    lab.wait(FIGURE_DRAWN)
    lab.cell("pattern, labels = torch.rand(4096, 4096).tril(), [f'token {i}' for i in range(4096)]")
    size, seconds = lab.measure_cell("plot.attention_pattern(pattern, labels)", FIGURE_DRAWN)
    print(f"a pattern of 4,096 tokens: {seconds:.1f} s, {size / 1e3:,.0f} kB", flush=True)
    lab.close()


def measure_heads(folder, lengths, longest):
    """Measure a layer of 32 heads in AttentionExplorer and in CircuitsVis."""
    lab = CountingLab()
    lab.cell(LENS + "AttentionExplorer(lens, prompt(8))")
    lab.wait(DRAWN)
    if folder:
        lab.cell(THEIRS.format(folder=folder) + "theirs(8)")
        lab.wait(THEIRS_DRAWN)
    for n in lengths:
        lab.cell("0")
        size, seconds = lab.measure_cell(f"AttentionExplorer(lens, prompt({n}))", DRAWN)
        print(f"{n:5} tokens x 32 heads: AttentionExplorer {size / 1e3:10,.0f} kB {seconds:6.2f} s", flush=True)
        if folder:
            measure_circuitsvis(lab, n, longest, size)
    lab.close()


def measure_circuitsvis(lab, n, longest, our_bytes):
    """Measure CircuitsVis on the same heads; above `longest` tokens only its bytes, since the page would crash."""
    lab.cell("0")
    if n > longest:
        n_bytes = f"len(attention_heads(torch.rand(1, {n}, {n}).tril(), ['a'] * {n}).local_src) * 32"
        lab.cell(f"print('bytes:', {n_bytes})")
        size = int(lab.wait("document.querySelector('.jp-OutputArea').innerText.match(/bytes: (\\d+)/)?.[1]"))
        print(f"{'':27}CircuitsVis {size / 1e3:16,.0f} kB, not drawn; {size / our_bytes:.0f} x", flush=True)
        return
    size, seconds = lab.measure_cell(f"theirs({n})", THEIRS_DRAWN)
    print(f"{'':27}CircuitsVis {size / 1e3:16,.0f} kB {seconds:6.2f} s; {size / our_bytes:.0f} x the bytes", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--circuitsvis", help="the folder in which CircuitsVis is installed")
    parser.add_argument(
        "--lengths", type=json.loads, default=[64, 256, 1000], help="of prompts in tokens, as [64, 256]"
    )
    parser.add_argument("--longest", type=int, default=256, help="the longest prompt that CircuitsVis draws")
    args = parser.parse_args()
    measure_first_figures()
    measure_long_pattern()
    measure_heads(args.circuitsvis, args.lengths, args.longest)


if __name__ == "__main__":
    main()
