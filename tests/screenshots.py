"""Take screenshots of every view of the model inside the package, light and dark: python -m tests.screenshots OUT."""

import sys
from pathlib import Path

import numpy as np

import glmlens
from glmlens import analysis, circuits, patch, plot, timeline
from glmlens.html_report import save_html
from glmlens.patch import Site, rotary
from glmlens.tasks import TASKS
from tests.browser import Browser
from tests.hostile import HOSTILE
from tests.lab import Lab

PROMPT = "When Mary and John went to the store, John gave a drink to"
REPEATED = " first Hungary September brought found her sixth Greek Rose height night morning" * 2


def views():
    """Yield every figure with its name."""
    lens = glmlens.load(dtype="float32")
    kv = lens.cfg.n_kv_heads
    labels = lens.to_labels(PROMPT)
    about = {"model": lens.model_hash}
    _, acts = lens.run_with_cache(PROMPT)
    by_layer = analysis.logit_lens(lens, PROMPT, target=" Mary")
    yield "logit_lens", plot.logit_lens(by_layer)
    yield "logit_lens_kl", plot.logit_lens(by_layer, "kl")
    yield "logit_lens_rank", plot.logit_lens(by_layer, "target_rank")
    long = analysis.logit_lens(lens, " ".join([PROMPT] * 12))
    yield "logit_lens_long", plot.logit_lens(long, max_cells=100)
    pattern = acts["attn.pattern", 2][0]
    yield "attention_pattern", plot.attention_pattern(pattern[3], labels, title="Head 2.3", about=about)
    group = lens.cfg.n_heads // kv
    norms = acts["kv.v", 2][0, :, 3 // group].norm(dim=-1)
    yield (
        "attention_by_value_norm",
        plot.attention_pattern(
            pattern[3], labels, value_norms=norms, title="Head 2.3 weighted by value norm", about=about
        ),
    )
    yield (
        "attention_heads",
        plot.attention_heads(pattern, labels, n_kv_heads=kv, title="Attention of layer 2", about=about),
    )
    yield "attention_heads_of_32", plot.attention_heads(causal(32, 300), n_kv_heads=2, title="32 heads, 2 groups")
    yield "attention_4096", plot.attention_pattern(causal(1, 4096)[0], title="A pattern of 4,096 tokens")
    scores = analysis.head_scores(lens)
    yield "head_scores", plot.head_scores(scores, n_kv_heads=kv)
    yield from attributions(lens)
    stream = analysis.accumulated_residual(lens, PROMPT)
    yield "residual_norms", plot.residual_norms(stream)
    yield "residual_angles", plot.residual_angles(stream)
    yield from sweeps(lens)
    yield from rotaries(lens)
    yield from caches(lens)
    yield from others(lens, acts, labels)


def causal(heads, n):
    """Return random causal patterns [head, query, key]."""
    x = np.random.default_rng(0).gumbel(size=(heads, n, n)).astype(np.float32) * 2
    x = np.exp(np.where(np.tri(n, dtype=bool), x, -np.inf))
    return x / x.sum(-1, keepdims=True)


def attributions(lens):
    for by in ("component", "head", "neuron"):
        result = analysis.logit_attribution(lens, PROMPT, " Mary", " John", by=by)
        yield f"attribution_{by}", plot.logit_attribution(result)
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
    scores = circuits.attribute_edges(lens, examples, "flip", method="eap-ig")
    yield "circuit", plot.circuit(scores, top=20)
    yield "circuit_60", plot.circuit(scores, top=60)


def rotaries(lens):
    parts = analysis.score_parts(lens, REPEATED, 3, 4)
    yield "score_by_pair", plot.score_by_pair(parts)
    yield "rotary_patterns", plot.rotary_patterns(parts)
    yield "rotary_angles", plot.rotary_angles(parts)
    profile = analysis.distance_profile(lens, REPEATED, distances=64)
    yield "attention_by_distance", plot.attention_by_distance(profile, 2)
    yield "score_by_distance", plot.attention_by_distance(profile, 2, show="score")
    use = analysis.pair_use(lens)
    for kind in ("previous", "induction"):
        yield f"pair_use_{kind}", plot.pair_use(use, kind)
    pairs = {f"pair {i} frozen": rotary.freeze(lens, pair=i) for i in range(lens.cfg.d_rotary // 2)}
    pairs |= {"all frozen": rotary.freeze(lens), "stretched 2x": rotary.stretch(lens, "linear", 2)}
    effects = rotary.breakage(lens, REPEATED, pairs)
    for show in ("kl", "loss", "agreement"):
        yield f"breakage_{show}", plot.breakage(effects, show)


def caches(lens):
    kv = lens.new_kv()
    lens(PROMPT, kv=kv)
    yield "cache_keys", plot.cache_norms(kv, lens.to_labels(PROMPT), about={"model": lens.model_hash})
    yield "cache_values", plot.cache_norms(kv, lens.to_labels(PROMPT), of="values")
    reads = analysis.cache_reads(lens, PROMPT, " Mary", " John")
    for show in ("attention", "weighted", "direct"):
        yield f"cache_reads_{show}", plot.cache_reads(reads, show)
    yield "cache_reads_layer", plot.cache_reads(reads, "direct", layer=3)
    effects = analysis.leave_one_out(lens, PROMPT)
    yield "leave_one_out_kl", plot.leave_one_out(effects)
    yield "leave_one_out_logit", plot.leave_one_out(effects, "logit")
    yield "leave_one_out_position", plot.leave_one_out(analysis.leave_one_out(lens, PROMPT, by="position"), "logit")
    curves = {by: analysis.eviction_curve(lens, PROMPT, by=by) for by in ("position", "entry")}
    yield "eviction", plot.eviction(curves)
    yield "eviction_of_one", plot.eviction(curves["entry"])


def others(lens, acts, labels):
    yield "generation", plot.generation(timeline.record_timeline(lens, PROMPT, 10))
    norms = acts["resid_post"][:, 0].norm(dim=-1)
    named = {"layer": [str(i) for i in range(len(norms))], "pos": labels}
    yield "lines", plot.lines(norms, named, axes=("layer", "pos"), what="norm", title="Norm by layer")
    yield "bars", plot.bars(norms[-1] - norms[-2], {"part": labels}, what="change of norm", title="The last layer")
    change = norms[-1] - norms[-1].mean()
    yield "tokens", plot.tokens(change, labels, what="norm minus the mean", title="Coloured tokens")
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
    "explorer_cache": """
explorer = CacheInspector(lens, PROMPT)
explorer.select(position=3)
explorer.alter("drop everywhere")
explorer.select(layer=2, kv=2, position=12)""",
    "explorer_cache_leave_one_out": """
explorer = CacheInspector(lens, PROMPT)
explorer.select(step=5, layer=2, kv=2, position=17, by="logit")""",
    "explorer_rotary": """
explorer = RotaryExplorer(lens, PROMPT)
explorer.select(layer=1, head=7, query=9, key=8, pairs=(0, 1, 2, 4, 5, 6, 7), content=False)""",
    "explorer_rotary_mean": """
explorer = RotaryExplorer(lens, PROMPT)
explorer.select(layer=1, head=7, of="mean", distance=3)""",
    "explorer_generation": """
explorer = GenerationExplorer(lens, PROMPT)
explorer.branch(" John", 0)
explorer.select(step=2, layer=2)""",
    "explorer_generation_branch": """
explorer = GenerationExplorer(lens, PROMPT)
explorer.branch(" John", 0)
explorer.select(run="branch", by="chosen")""",
    "explorer_error": """
explorer = AttentionExplorer(lens, PROMPT)
explorer.select_safely(layer=9)""",
}
BEFORE = f"""
import glmlens
from glmlens.tasks import TASKS
from glmlens.widgets import AttentionExplorer, CacheInspector, GenerationExplorer, PatchExplorer, RotaryExplorer
lens, PROMPT = glmlens.load(dtype="float32"), {PROMPT!r}"""


def explorers(out, only):
    """Take screenshots of the explorers in a JupyterLab."""
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


def figures(out, only):
    """Take screenshots of the figures, each in a page of its own."""
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


def main(out, *only):
    """Take screenshots of all views, or of those whose names begin so, and print the size of each figure."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if not only or any(not name.startswith("explorer") for name in only):
        figures(out, only)
    explorers(out, only)


if __name__ == "__main__":
    main(*sys.argv[1:])
