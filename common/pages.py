"""Self-contained HTML pages for a person to read: reports of training, comparison and monitoring."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
tr, img { break-inside: avoid; }
h2 { break-after: avoid; }
@media screen { table { display: block; overflow-x: auto; } }
th, td { padding: .25rem .8rem; text-align: left; border-bottom: 1px solid #ddd; }
td:first-child { white-space: nowrap; }
.number { text-align: right; }
.notice { background: #fff4d6; border-left: .3rem solid #d99a00; padding: .5rem 1rem; }
.warning { background: #fbe7e8; border-left: .3rem solid #b3202c; padding: .5rem 1rem; }
img { max-width: 100%; }
@media (max-width: 40rem) { td:first-child { white-space: normal; } th, td { padding: .2rem .4rem; } }
"""
_NAMES = {
    "roc_auc": "ROC AUC",
    "brier": "Brier score",
    "psi": "PSI",
    "jensen_shannon": "Jensen-Shannon",
    "by_chance": "probability by chance",
}


def page(title: str, notices: Sequence[str], *parts: str, warnings: Sequence[str] = ()) -> str:
    """A whole document. `parts` are HTML; all other texts are escaped."""
    head = html.escape(title)
    boxes = "".join(f'<p class="notice">{html.escape(line)}</p>' for line in notices)
    boxes += "".join(f'<p class="warning">{html.escape(line)}</p>' for line in warnings)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{head}</title>'
        f"<style>{_STYLE}</style><h1>{head}</h1>{boxes}{''.join(parts)}"
        "<p>Research software, not a medical device. Validate on local data before any patient is scored.</p></html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def facts_table(facts: Mapping[str, Any]) -> str:
    """Two columns: name and value."""
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<table>{rows}</table>"


def frame_table(frame: pd.DataFrame) -> str:
    """A frame. Underscores in names become spaces, fractions have four digits, missing values are empty."""
    columns = [
        ("" if frame[name].dtype.kind not in "iuf" else ' class="number"', _NAMES.get(name, str(name)), frame[name])
        for name in frame
    ]
    head = "".join(f"<th{kind}>{html.escape(name.replace('_', ' '))}</th>" for kind, name, _ in columns)
    cells = [[f"<td{kind}>{html.escape(_shown(value))}</td>" for value in column] for kind, _, column in columns]
    rows = "".join(f"<tr>{''.join(row)}</tr>" for row in zip(*cells, strict=True))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _shown(value: Any) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def image(figure: Any, alt: str) -> str:
    """A matplotlib figure as an image inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def listing(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
