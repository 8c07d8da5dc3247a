"""Figures in words and tables, the same everywhere on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from common.pages import frame_table

NOTHING = "not known"


def share(value: float | None, span: Sequence[float] | None = None, digits: int = 1) -> str:
    """Percent, with the 95% interval where there is one."""
    if value is None:
        return NOTHING
    shown = f"{value:.{digits}%}"
    return shown if not span else f"{shown} ({span[0]:.{digits}%} to {span[1]:.{digits}%})"


def plain(value: float | None, span: Sequence[float] | None = None, digits: int = 2) -> str:
    if value is None:
        return NOTHING
    shown = f"{value:,.{digits}f}"
    return shown if not span else f"{shown} ({span[0]:,.{digits}f} to {span[1]:,.{digits}f})"


def hours(quartiles: Sequence[float] | None) -> str:
    """Median and quartiles."""
    return "none" if not quartiles else "{:.1f} h (quartiles {:.1f} to {:.1f})".format(*quartiles)


def of(record: Mapping[str, Any], name: str, show: Any = share, **how: Any) -> str:
    return show(record.get(name), record.get(f"{name}_95"), **how)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    return frame_table(pd.DataFrame(rows).astype(object).fillna("")) if rows else ""


def window_of(record: Mapping[str, Any]) -> float:
    return record["settings"]["window_hours"]


def dated(record: Mapping[str, Any]) -> bool:
    return f"ppv_{window_of(record):g}h" in record["alerts"]["deployed"]


def beyond(difference: Mapping[str, Any]) -> str:
    """A paired difference of shares in words."""
    span = difference["difference_95"]
    if span is None or difference["difference"] is None:
        return "the difference is not known"
    shown = f"the difference is {points(difference, ' points')}"
    if span[0] <= 0 <= span[1]:
        return f"{shown}, no more than chance"
    return f"{shown}, more than chance, {'in favour of' if span[0] > 0 else 'against'} the model"


def points(difference: Mapping[str, Any], unit: str = "") -> str:
    """A paired difference of shares in percentage points, with its 95% interval."""
    span = difference["difference_95"]
    if span is None or difference["difference"] is None:
        return NOTHING
    return f"{100 * difference['difference']:+.1f}{unit} ({100 * span[0]:+.1f} to {100 * span[1]:+.1f})"


def signed(difference: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A paired difference of other figures, with its 95% interval."""
    if difference is None or difference["difference_95"] is None or difference["difference"] is None:
        return NOTHING
    low, high = difference["difference_95"]
    return f"{difference['difference']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
