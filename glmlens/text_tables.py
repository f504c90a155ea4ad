"""Text for tables and messages: aligned columns, numbers of bytes, ranges of numbers."""

from collections.abc import Sequence


def format_ranges(layers: list[int]) -> str:
    """Return ascending numbers as ranges: [0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for i in layers:
        if runs and i == runs[-1][-1] + 1:  # it continues the last run
            runs[-1].append(i)
        else:
            runs.append([i])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def format_bytes(n: int) -> str:
    """Return a number of bytes in GB, MB or kB with one decimal, or in B."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n} B"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines of text with aligned columns; all rows have the same length."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
