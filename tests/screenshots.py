"""Every view of the model inside the package, photographed in light and dark: python -m tests.screenshots OUT."""

import sys
from pathlib import Path

import numpy as np
import torch

import glmlens
from glmlens import analysis, patch, plot
from glmlens.patch import Site
from glmlens.report import save_html
from glmlens.tasks import TASKS
from tests.browser import Browser
from tests.lab import Lab

PROMPT = "When Mary and John went to the store, John gave a drink to"
HOSTILE = [
    "<script>window.ran=1</script>",
    "<img src=x onerror=window.ran=1>",
    "</script><b>",
    "<b>bold</b>",
    "$x^2$",
    "\ud83d",
    "\ufffd",
    "&lt;",
    '" onmouseover="window.ran=1',
    "<a href='https://example.com'>a</a>",
    "line\nbreak",
    "\u202eabc",
]


def views():
    """Every view by name."""
    lens = glmlens.load(dtype="float32")
    kv = lens.cfg.n_kv_heads
    labels = lens.to_labels(PROMPT)
    _, acts = lens.run_with_cache(PROMPT)
    read = analysis.logit_lens(lens, PROMPT, target=" Mary")
    yield "logit_lens", plot.logit_lens(read)
    yield "logit_lens_kl", plot.logit_lens(read, "kl")
    yield "logit_lens_rank", plot.logit_lens(read, "target_rank")
    long = analysis.logit_lens(lens, " ".join([PROMPT] * 12))
    yield "logit_lens_long", plot.logit_lens(long, max_cells=100)
    pattern = acts["attn.pattern", 2][0]
    yield "attention_pattern", plot.attention_pattern(pattern[3], labels, title="Head 2.3")
    group = lens.cfg.n_heads // kv
    norms = acts["kv.v", 2][0, :, 3 // group].norm(dim=-1)
    yield "attention_by_value", plot.attention_pattern(pattern[3], labels, value_norms=norms, title="Head 2.3 by value")
    yield "attention_heads", plot.attention_heads(pattern, labels, n_kv_heads=kv, title="Attention of layer 2")
    yield "attention_heads_of_32", plot.attention_heads(causal(32, 300), n_kv_heads=2, title="32 heads, 2 groups")
    yield "attention_4096", plot.attention_pattern(causal(1, 4096)[0], title="A pattern of 4,096 tokens")
    scores = analysis.head_scores(lens)
    yield "head_scores", plot.head_scores(scores, n_kv_heads=kv)
    yield from attributions(lens)
    stream = analysis.accumulated_residual(lens, PROMPT)
    yield "residual_norms", plot.residual_norms(stream)
    yield "residual_angles", plot.residual_angles(stream)
    yield from sweeps(lens)
    yield from others(lens, acts, labels)


def causal(heads, n):
    """Random patterns, each query over the keys up to its own."""
    x = np.random.default_rng(0).gumbel(size=(heads, n, n)).astype(np.float32) * 2
    x = np.exp(np.where(np.tri(n, dtype=bool), x, -np.inf))
    return x / x.sum(-1, keepdims=True)


def attributions(lens):
    for by in ("component", "head", "neuron"):
        found = analysis.logit_attribution(lens, PROMPT, " Mary", " John", by=by)
        yield f"attribution_{by}", plot.logit_attribution(found)
    source = analysis.logit_attribution(lens, PROMPT, " Mary", " John", by="source")
    yield "attribution_source", plot.logit_attribution(source, top=20)
    yield "attribution_by_key", plot.logit_attribution(source, over="key")


def sweeps(lens):
    examples = TASKS["ioi"].examples(lens, 24, "demo").of_length()
    places = ("IO", "S1", "S2", "end")
    both = {}
    for point in ("resid_pre", "attn_out", "mlp_out"):
        site = Site(point, pos=places)
        both[point] = patch.sweep(lens, examples, "flip", site, over=("layer", "pos"), progress=False, null=2)
    yield "patch_grid", plot.patch_grid(both["resid_pre"])
    yield "compare_grids", plot.compare(both)
    one = {}
    for point in ("attn_out", "mlp_out"):
        one[point] = patch.sweep(lens, examples, "flip", Site(point, pos="end"), over=("layer",), progress=False)
    yield "compare_lines", plot.compare(one)
    graph = patch.Graph.of(lens.cfg)
    scores = torch.randn(graph.mask.shape, generator=torch.Generator().manual_seed(0)) ** 5 * graph.mask * 0.01
    yield "circuit", plot.circuit(patch.EdgeScores(graph, scores, 0.0, {"metric": "random numbers"}), top=25)


def others(lens, acts, labels):
    steps = list(lens.stream(PROMPT, 10))
    yield "generation", plot.generation(steps, lens.tokenizer.label)
    norms = acts["resid_post"][:, 0].norm(dim=-1)
    named = {"layer": [str(i) for i in range(len(norms))], "pos": labels}
    yield "lines", plot.lines(norms, named, axes=("layer", "pos"), what="length", title="Length by layer")
    yield "bars", plot.bars(norms[-1] - norms[-2], {"part": labels}, what="change of length", title="The last layer")
    change = norms[-1] - norms[-1].mean()
    yield "tokens", plot.tokens(change, labels, what="length less the mean", title="Coloured tokens")
    n, every = len(HOSTILE), " ".join(HOSTILE)
    named = {"row": HOSTILE, "column": HOSTILE}
    yield "hostile_heatmap", plot.heatmap(np.eye(n), named, what="<b>", title=every, subtitle=HOSTILE[0])
    yield "hostile_tokens", plot.tokens(np.linspace(-1, 1, n), HOSTILE, title=HOSTILE[0], what=HOSTILE[1])
    yield "hostile_text", "\n".join(HOSTILE)


EXPLORERS = {
    "explorer_attention": """
explorer = AttentionExplorer(lens, PROMPT)
explorer.select(layer=2, head=6, query=11, key=3)""",
    "explorer_attention_long": """
explorer = AttentionExplorer(lens, " ".join([PROMPT] * 40))
explorer.select(layer=1, head=4, query=300, by_value=True)""",
    "explorer_patching": """
explorer = PatchExplorer(lens, TASKS["ioi"].examples(lens, 4, "demo"))""",
    "explorer_patching_heads": """
explorer = PatchExplorer(lens, TASKS["ioi"].examples(lens, 4, "demo"))
explorer.run(site="attn.z", over="head")
explorer.select(view="heads")""",
    "explorer_patching_head": """
explorer = PatchExplorer(lens, TASKS["ioi"].examples(lens, 4, "demo"))
explorer.select(row=1, view="head", layer=2, head=6)""",
    "explorer_error": """
explorer = AttentionExplorer(lens, PROMPT)
explorer.asked(layer=9)""",
}
BEFORE = f"""
import glmlens
from glmlens.tasks import TASKS
from glmlens.widgets import AttentionExplorer, PatchExplorer
lens, PROMPT = glmlens.load(dtype="float32"), {PROMPT!r}"""


def explorers(out, only):
    """Photograph the explorers in a JupyterLab."""
    chosen = {name: code for name, code in EXPLORERS.items() if not only or name.startswith(only)}
    if not chosen:
        return
    lab = Lab()
    for name, code in chosen.items():
        lab.cell(f"{BEFORE}{code}\nexplorer")
        lab.wait("document.querySelector('.glmlens-heads canvas, .heatmaplayer image')")
        for dark in (False, True):
            lab.theme(dark)
            lab.photograph(out / f"{name}-{'dark' if dark else 'light'}.png")
        print(f"{name:24}", *lab.errors, flush=True)
    lab.close()


def main(out, *only):
    """Draw and photograph all views, or those whose names begin so; says how many bytes each weighs."""
    out = Path(out)
    browser = Browser()
    for name, view in views():
        if only and not name.startswith(only):
            continue
        page = save_html(out / f"{name}.html", name, [view])
        weight = len(view.to_json()) if hasattr(view, "to_json") else 0
        for dark in (False, True):
            browser.open(page, dark).picture(out / f"{name}-{'dark' if dark else 'light'}.png")
        print(f"{name:24}{weight / 1000:9.1f} kB", *browser.errors, flush=True)
    browser.close()
    explorers(out, only)


if __name__ == "__main__":
    main(*sys.argv[1:])
