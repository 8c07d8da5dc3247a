"""What README and docs say is what is there."""

import re
from pathlib import Path

import pytest

from batch_processor import CRONTAB
from feature_pipeline import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README, SERVING, CONTRIBUTING = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/serving.md", "CONTRIBUTING.md")
)
MOST_WORDS = 1800


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_continuous_integration_runs_the_readmes_test_line():
    line = next(block.strip() for block in blocks("shell") if "requirements-test.txt" in block)
    assert line in (ROOT / ".ci" / "run").read_text()


def test_the_readme_is_short():
    assert len(README.split()) <= MOST_WORDS


def test_the_crontab_line_is_the_one_of_help_and_examples():
    crontab = (ROOT / "examples/deployment/crontab").read_text()
    assert CRONTAB in SERVING and CRONTAB.split(" ", 5)[5] in crontab


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(document):
    text = re.sub(r"https?://\S+", "", document.read_text(encoding="utf-8"))
    for name in set(re.findall(r"(?<![\w/.{*-])[\w-]+[\w/.-]*\.(?:py|txt|ipynb)\b", text)):
        if not name.startswith(WRITTEN):
            found = (ROOT / name, *ROOT.glob(f"*/{name}"), *ROOT.glob(f"*/*/{name}"))
            assert any(path.exists() for path in found), name


# by the scripts, in models/ and elsewhere
WRITTEN = ("models/", "best_", "feature_names", "production_model_info", "optimization_", "holdout_")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_a_heading(document):
    for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text(encoding="utf-8")):
        path = document.parent / target if target else document
        assert path.exists(), target
        assert not heading or heading in anchors(path), f"{target}#{heading}"


def test_every_page_is_linked_from_the_readme():
    for path in DOCUMENTS:
        assert path.name == "README.md" or f"]({path.relative_to(ROOT)})" in README, path.name


def test_versions_and_times_that_the_documents_show_are_of_one_day():
    """They differ from run to run and are not compared, so that parts of several runs would not be noticed."""
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    days = {day.replace("-", "") for day in re.findall(r"\d{4}-\d\d-\d\d(?=T[\d:]{8}\+00:00)", text)}
    assert len(days | set(re.findall(r"\b(\d{8})_\d{6}\b", text))) == 1


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_every_top_level_file_is_in_the_layout(script):
    assert f"`{script}`" in CONTRIBUTING


def test_every_column_is_explained():
    assert all(f"`{column}`" in README for column in COLUMNS)


def test_every_script_has_a_section():
    for path in ROOT.glob("*.py"):
        if path.name not in ("feature_pipeline.py", "gunicorn.conf.py"):
            assert f"\n### `{path.name}`" in README, path.name
