"""Numbers as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

NO_NUMBER = "–"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table; the first row has the headings, and numbers stand in all columns but the first."""
    heads, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float | None) -> str:
    return NO_NUMBER if share is None else f"{100 * share:.1f}"
