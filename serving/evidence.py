"""What answers and reports say about the evidence behind a score."""

from __future__ import annotations

from collections.abc import Mapping


def unused_text(counts: Mapping[str, int], most: int = 5) -> str:
    """One line on the codes that the model does not use, with their numbers of rows; the most frequent first.

    >>> unused_text({"8302-2": 3, "NOTE": 1})
    "codes that the model does not use: '8302-2' (3 rows), 'NOTE' (1 row)"
    """
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{code!r} ({n:,} row{'s' * (n != 1)})" for code, n in ordered[:most]]
    more = f" and {len(ordered) - most} more codes" if len(ordered) > most else ""
    return f"codes that the model does not use: {', '.join(told)}{more}"
