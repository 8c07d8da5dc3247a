"""Papers that a hospital must fill in: the project writes what it knows, and counts what is left to a person.

``source_attributes.json`` (HTI-1), ``tripod_ai.json`` and ``applied_model_card.xml`` (CHAI), and ``papers.html`` with
all of them. A TOML file may hold what people wrote, by paper and item, and is used at the next evaluation::

    [source_attributes]
    "1.i" = "Data team of St. Example, data@example.org"
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from common.artifacts import read_toml, write_atomic, write_json
from common.pages import frame_table, heading, page, paragraph
from evaluation.exports import model_card, source_attributes, tripod
from evaluation.exports.facts import facts_of
from evaluation.exports.source_attributes import Item
from feature_pipeline import BadConfig, Config, listed

PAPERS = {
    "source_attributes": (
        "Source attributes of a predictive decision support intervention, 45 CFR 170.315(b)(11)(iv)(B)",
        source_attributes.ITEMS,
    ),
    "tripod_ai": ("TRIPOD+AI, BMJ 2024;385:e078378", tripod.ITEMS),
    "applied_model_card": ("CHAI applied model card, schema 0.2", model_card.ITEMS),
}


def filled(items: tuple[Item, ...], facts: Mapping[str, str], written: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each item with its answer: what the project knows, and what a person wrote. `left` is what is still to be
    written, None where the item is complete."""
    rows = []
    for item in items:
        known = [facts[name] for name in item.facts if name in facts]
        by_person = written.get(item.number, "")
        left = item.left or ("" if known else "this evaluation does not tell it")
        rows.append(
            {
                "item": item.number,
                "title": item.title,
                "answer": " ".join([*known, *([by_person] if by_person else [])]),
                "answered_by": [*(["project"] if known else []), *(["person"] if by_person else [])],
                "left": left if left and not by_person else None,
            }
        )
    return rows


def read_answers(path: str | None) -> dict[str, dict[str, str]]:
    """What people wrote. Raises `BadConfig` for a file that cannot be read, a paper or an item that is not known."""
    if path is None:
        return {}
    where = f"answers {path!r}"
    content = read_toml(path, "answers")
    for paper, answers in content.items():
        if paper not in PAPERS or not isinstance(answers, dict):
            raise BadConfig(f"{where}: unknown paper {paper!r}; known: {listed(PAPERS)}")
        known = {item.number for item in PAPERS[paper][1]}
        if unknown := [number for number in answers if number not in known]:
            raise BadConfig(f"{where}: {paper} has no item {listed(unknown)}")
        if not all(isinstance(text, str) and text.strip() for text in answers.values()):
            raise BadConfig(f"{where}: each answer of {paper} must be a text")
    return content


def write_papers(
    folder: Path, config: Config, record: Mapping[str, Any], answers: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[int, int]]:
    """Writes all papers to a folder; (items that a person has still to write, items) of each."""
    facts, parts, counts = facts_of(config, record), [], {}
    for paper, (title, items) in PAPERS.items():
        rows = filled(items, facts, answers.get(paper, {}))
        n_open = sum(row["left"] is not None for row in rows)
        counts[paper] = (n_open, len(rows))
        if paper == "applied_model_card":
            texts = {
                row["item"]: " ".join(
                    [row["answer"], *([model_card.LEFT + row["left"]] if row["left"] else [])]
                ).strip()
                for row in rows
            }
            write_atomic(folder / "applied_model_card.xml", model_card.xml_of(texts))
        else:
            write_json(folder / f"{paper}.json", {"title": title, "open": n_open, "items": rows})
        table = pd.DataFrame(
            {
                "item": [row["item"] for row in rows],
                "asks for": [row["title"] for row in rows],
                "answer": [row["answer"] for row in rows],
                "to be written": [row["left"] or "" for row in rows],
            }
        )
        said = f"{len(rows) - n_open} of {len(rows)} items are complete; {n_open} are left to a person."
        parts += [heading(title), paragraph(said), frame_table(table)]
    title = f"Papers of model {config.model_version or 'unversioned'}"
    write_atomic(folder / "papers.html", page(title, [], *parts))
    return counts
