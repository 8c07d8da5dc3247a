"""What the README says is what is there."""

import re
from pathlib import Path

import pytest

from batch_processor import CRONTAB
from feature_pipeline import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_continuous_integration_runs_the_readmes_test_line():
    line = next(block.strip() for block in blocks("shell") if "requirements-test.txt" in block)
    assert line in (ROOT / ".ci" / "run").read_text()


def test_the_crontab_line_is_the_one_of_help_and_examples():
    crontab = (ROOT / "examples/deployment/crontab").read_text()
    assert CRONTAB in README and CRONTAB.split(" ", 5)[5] in crontab


def test_every_script_that_is_named_exists():
    for name in set(re.findall(r"[\w/][\w/.-]*\.(?:py|txt|ipynb)\b", README)):
        if name.startswith(("models/", "best_", "feature_names", "production_", "optimization_")):
            continue
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_every_link_leads_to_a_file(document):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_every_top_level_file_stands_in_the_layout(script):
    assert f"`{script}`" in README


def test_every_column_is_explained():
    assert all(f"`{column}`" in README for column in COLUMNS)


def test_no_placeholder_is_left():
    assert "@@" not in README
