"""Text as coloured tokens: HTML in which the text of tokens is always escaped."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from glmlens.plot.arrays import Numbers, to_float_array
from glmlens.plot.style import show_control_characters
from glmlens.results import Labelled

POSITIVE_RGB = (214, 96, 77)
NEGATIVE_RGB = (67, 147, 195)
MAX_OPACITY = 0.6  # black and white text stay readable on the strongest colour


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens with a number each [pos]; a notebook shows coloured text, red positive, blue negative, number on hover."""

    labels: tuple[str, ...]
    values: np.ndarray
    what: str
    title: str
    roles: tuple[str, ...] = ()

    def to_html(self) -> str:
        """Return one HTML element, without scripts and without anything to load."""
        most = float(np.abs(self.values[np.isfinite(self.values)]).max(initial=0)) or 1.0
        spans = "".join(
            self.role_break(i) + self.token_span(i, label, float(v), most)
            for i, (label, v) in enumerate(zip(self.labels, self.values, strict=True))
        )
        title = (
            f'<div style="font-weight:600;margin-bottom:.3em">{to_html_text(self.title)}</div>' if self.title else ""
        )
        scale = f"{to_html_text(self.what)}: colours from {-most:.3g} to {most:.3g}"
        ends = f'<div style="opacity:.7;font-size:85%">{scale}</div>'
        style = "font-family:inherit;white-space:normal;background:none;padding:0;margin:.5em 0;line-height:1.9"
        return f'<pre class="tex2jax_ignore mathjax_ignore" style="{style}">{title}{spans}{ends}</pre>'

    def role_break(self, i: int) -> str:
        """Return a line break and the role, if another role begins at token i, else nothing."""
        if not self.roles or self.roles[i] == (self.roles[i - 1] if i else ""):
            return ""
        return f'<br><span style="opacity:.7;font-size:85%;margin-right:.5em">{to_html_text(self.roles[i])}</span>'

    def token_span(self, i: int, label: str, value: float, most: float) -> str:
        """Return one token, coloured by its value, with the value on hover."""
        depth = MAX_OPACITY * abs(value) / most if np.isfinite(value) else 0.0
        color = ",".join(map(str, (*(POSITIVE_RGB if value > 0 else NEGATIVE_RGB), f"{depth:.3f}")))
        who = f" ({show_control_characters(self.roles[i])})" if self.roles and self.roles[i] else ""
        hover = escape(f"{i} {show_control_characters(label)}{who}: {self.what} {value:.4g}", quote=True)
        style = f"background:rgba({color});padding:.15em .2em;border-radius:3px;margin-right:1px"
        # Break the line after a newline token, and allow a break after any other.
        end = "<br>" if label.endswith(("\n", "↵")) else "<wbr>"
        return f'<span style="{style}" title="{hover}">{to_html_text(label)}</span>{end}'

    def _repr_html_(self) -> str:
        return self.to_html()


def to_html_text(label: str) -> str:
    """Return text escaped for HTML."""
    return escape(show_control_characters(label), quote=True)


def tokens(
    data: Numbers,
    labels: Sequence[str] | None = None,
    *,
    roles: Sequence[str] | None = None,
    what: str = "value",
    title: str = "",
) -> Tokens:
    """Colour tokens by numbers [pos]; `labels` are by default those of the result.

    `roles`, one per token as `lens.roles(messages)` returns them, are written where they begin. Raises ValueError for
    several axes, or another number of labels or roles.
    """
    if isinstance(data, Labelled):
        if len(data.axes) != 1:
            raise ValueError(f"expected one axis, got {data.axes}; select along the others with data.at(...)")
        labels = labels or data.labels[data.axes[0]]
        what = data.about.get("metric", what) if what == "value" else what
    values: Any = to_float_array(data.values if isinstance(data, Labelled) else data)
    if labels is None or len(labels) != len(values):
        raise ValueError(f"{len(values)} numbers need as many labels, got {None if labels is None else len(labels)}")
    if roles is not None and len(roles) != len(values):
        raise ValueError(f"{len(values)} numbers need as many roles, got {len(roles)}")
    return Tokens(labels=tuple(map(str, labels)), values=values, what=what, title=title, roles=tuple(roles or ()))
