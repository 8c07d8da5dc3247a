"""The Python of guide and README runs as it stands; the guide names every feature and every field of the config."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from feature_pipeline import CLINICAL, CONTEXT, STATISTICS, Config

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


def test_every_feature_is_in_the_guide():
    for name in STATISTICS:
        assert f"| `{name}` |" in GUIDE, name
    for name in CONTEXT:
        assert f"`context__{name}`" in GUIDE, name
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
    import os

    backend = "import matplotlib; matplotlib.use('Agg')\n"
    code = backend + "\n".join(cells) + "\nprint(drift.iloc[0]['what'])"
    environment = {**os.environ, "SEPSIS_MODELS_DIR": str(folder / "models")}
    shown = run_code(f"import os; os.chdir({str(ROOT / 'examples')!r})\n" + code, folder, **environment)
    assert "Resp" in shown.splitlines()[-1] or "news2" in shown.splitlines()[-1] or "respiration" in shown
