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


def test_every_link_within_the_readme_leads_to_a_heading():
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]+)\)", README))
    assert links and links <= anchors, links - anchors


def test_versions_and_times_that_the_readme_shows_are_of_one_day():
    """They differ from run to run and are not compared, so that parts of several runs would go unseen."""
    days = {day.replace("-", "") for day in re.findall(r"\d{4}-\d\d-\d\d(?=T[\d:]{8}\+00:00)", README)}
    assert days == set(re.findall(r"\b(\d{8})_\d{6}\b", README))


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_every_top_level_file_stands_in_the_layout(script):
    assert f"`{script}`" in README


def test_every_column_is_explained():
    assert all(f"`{column}`" in README for column in COLUMNS)


def test_no_placeholder_is_left():
    assert "@@" not in README
