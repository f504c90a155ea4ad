"""Plotly figures of results: functions from labelled numbers to a figure, without models, displaying nothing.

Every function takes a result (or plain numbers, with labels) first and returns a figure. All take the keywords of
`Look`: title, subtitle, about, height, width.
"""

from glmlens.deprecated import resolve_old_names
from glmlens.plot.bars import bars, logit_attribution
from glmlens.plot.cache import cache_norms, cache_reads, eviction, leave_one_out
from glmlens.plot.circuit import circuit
from glmlens.plot.heads import attention_heads
from glmlens.plot.heatmaps import (
    attention_pattern,
    head_scores,
    heatmap,
    logit_lens,
    patch_grid,
    residual_angles,
    residual_norms,
)
from glmlens.plot.lines import compare, lines
from glmlens.plot.rotary import (
    attention_by_distance,
    breakage,
    pair_use,
    rotary_angles,
    rotary_patterns,
    score_by_pair,
)
from glmlens.plot.style import TEMPLATE, Look
from glmlens.plot.timeline import generation
from glmlens.plot.tokens import Tokens, tokens

__all__ = [
    "TEMPLATE",
    "Look",
    "Tokens",
    "attention_by_distance",
    "attention_heads",
    "attention_pattern",
    "bars",
    "breakage",
    "cache_norms",
    "cache_reads",
    "circuit",
    "compare",
    "eviction",
    "generation",
    "head_scores",
    "heatmap",
    "leave_one_out",
    "lines",
    "logit_attribution",
    "logit_lens",
    "pair_use",
    "patch_grid",
    "residual_angles",
    "residual_norms",
    "rotary_angles",
    "rotary_patterns",
    "score_by_pair",
    "tokens",
]

OLD_NAMES = {
    "left_out": "glmlens.plot.leave_one_out",
    "who_reads": "glmlens.plot.cache_reads",
}
__getattr__ = resolve_old_names("glmlens.plot", OLD_NAMES)
