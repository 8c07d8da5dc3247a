"""The Python of guide and README runs as it is, and their tables restate the code."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from feature_pipeline import (
    CLINICAL,
    CONCEPTS,
    CONTEXT,
    SET_ASIDE_REASONS,
    STATISTICS,
    UNKNOWN_REASONS,
    Config,
    FeaturePipelineError,
)

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "FEATURE_PIPELINE_GUIDE.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(models_dir, tmp_path_factory):
    """A project's folder after the quick start, but for the scripts."""
    folder = tmp_path_factory.mktemp("guide")
    shutil.copytree(models_dir, folder / "models")
    check = [sys.executable, str(ROOT / "run_tests.py"), "pipeline", "--patients", "30", "--quiet"]
    subprocess.run(check, cwd=folder, check=True, capture_output=True)
    return folder


def run_code(code, folder, **environment):
    prelude = f"import sys, warnings; sys.path.insert(0, {str(ROOT)!r}); warnings.simplefilter('ignore')\n"
    command = [sys.executable, "-c", prelude + code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment or None)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["FEATURE_PIPELINE_GUIDE.md", "README.md"])
def test_the_python_of_the_documents_runs(folder, name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    run_code("\n".join(blocks), folder)


def table(*rows) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def said(function) -> str:
    """The docstring in one line."""
    return " ".join(inspect.getdoc(function).split())


def statistics():
    rows = [(f"`{s.name}`", s.block, "yes" if s.windowed else "", said(s.function)) for s in STATISTICS.values()]
    return table(("statistic", "block", "also over windows", "what"), *rows)


def contexts():
    return table(("context", "what"), *((f"`context__{name}`", said(c.function)) for name, c in CONTEXT.items()))


def concepts():
    rows = []
    for c in CONCEPTS:
        limits = f"{c.low:g} to {c.high:g}" if np.isfinite(c.low) else ""
        units = ", ".join(unit.spellings.split(",")[0] for unit in c.units)
        codes = "; ".join([f"{c.name}, {c.codes}", *(f"{unit}: {codes}" for unit, codes in c.coded_in.items())])
        rows.append((f"`{c.name}`", c.unit, units, limits, codes))
    return table(("concept", "unit", "other units", "limits", "codes"), *rows)


def errors():
    kinds = FeaturePipelineError.__subclasses__()
    own = [kind for kind in kinds if kind.__module__ == "feature_pipeline"]
    return table(("error", "code", "what"), *((f"`{e.__name__}`", f"`{e.code}`", said(e)) for e in own))


def reasons(texts):
    return table(("reason", "what"), *((f"`{name}`", text) for name, text in texts.items()))


TABLES = {  # page -> name of the table -> its text
    "FEATURE_PIPELINE_GUIDE.md": {
        **{"statistics": statistics, "context": contexts, "concepts": concepts, "errors": errors}
    },
    "docs/data.md": {"set aside": lambda: reasons(SET_ASIDE_REASONS)},
    "docs/serving.md": {"reasons": lambda: reasons(UNKNOWN_REASONS)},
}


@pytest.mark.parametrize("page", TABLES)
def test_tables_restate_the_code(page):
    """``TABLES_REWRITE=1`` writes them."""
    path = ROOT / page
    text = shown = path.read_text(encoding="utf-8")
    for name, make in TABLES[page].items():
        marked = rf"(<!-- table: {name} -->\n\n)(?:\|.*\n)*\n*"
        assert len(re.findall(marked, text)) == 1, name
        text = re.sub(marked, lambda found, make=make: f"{found[1]}{make()}\n\n", text)
    if os.environ.get("TABLES_REWRITE"):
        path.write_text(text, encoding="utf-8")
    else:
        assert shown == text


def test_every_clinical_score_is_in_the_guide():
    for name in CLINICAL:
        score, _, part = name.partition("_")
        assert f"`clinical__{name}`" in GUIDE or (f"`clinical__{score}`" in GUIDE and f"`_{part}`" in GUIDE), name


def test_every_field_of_the_config_is_in_the_guide():
    for name in (field.name for field in fields(Config)):
        assert f"`{name}`" in GUIDE, name


def test_the_notebook_runs_from_top_to_bottom(folder):
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    backend = "import matplotlib; matplotlib.use('Agg')\n"
    code = backend + "\n".join(cells) + "\nprint(drift.iloc[0]['what'])"
    environment = {**os.environ, "SEPSIS_MODELS_DIR": str(folder / "models")}
    shown = run_code(f"import os; os.chdir({str(ROOT / 'examples')!r})\n" + code, folder, **environment)
    assert "Resp" in shown.splitlines()[-1] or "news2" in shown.splitlines()[-1] or "respiration" in shown
