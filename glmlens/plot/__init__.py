"""Numbers in, Plotly figures out. Knows axes and labels, no models, and shows nothing by itself.

Every function takes a result (or plain numbers, with labels) first, and returns a figure. All take the keywords of
`Look`: title, subtitle, height, width.
"""

from glmlens.plot.bars import bars, logit_attribution
from glmlens.plot.graph import circuit
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
from glmlens.plot.style import TEMPLATE, Look
from glmlens.plot.timeline import generation
from glmlens.plot.tokens import Tokens, tokens

__all__ = [
    "TEMPLATE",
    "Look",
    "Tokens",
    "attention_heads",
    "attention_pattern",
    "bars",
    "circuit",
    "compare",
    "generation",
    "head_scores",
    "heatmap",
    "lines",
    "logit_attribution",
    "logit_lens",
    "patch_grid",
    "residual_angles",
    "residual_norms",
    "tokens",
]
