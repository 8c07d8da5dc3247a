"""The CSV files that say what codes mean."""

import pytest

from common.command_line import read_site_codes, read_synonyms
from feature_pipeline import BadConfig


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "codes.csv").write_text(text, encoding="utf-8")
        return str(tmp_path / "codes.csv")

    return write


def test_a_site_map_names_concept_and_unit(file, monkeypatch):
    path = file(
        "code,name,concept,unit\nPULS,Puls,heart_rate,\nKREA,Kreatinin,creatinine,umol/L\nNA,,sodium,\nX,other,,kg\n"
    )
    expected = {"PULS": ("heart_rate", ""), "KREA": ("creatinine", "umol/L"), "NA": ("sodium", "")}
    assert read_site_codes(path) == expected
    assert read_synonyms(path) == {code: concept for code, (concept, _) in expected.items()}
    assert read_site_codes(None) == {} and read_synonyms(None) == {}
    monkeypatch.setenv("SEPSIS_CODES", path)
    assert read_site_codes(None) == expected and read_synonyms(None) == {}
    assert read_site_codes(file("code,concept\nPULS,heart_rate\n")) == {"PULS": ("heart_rate", "")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("code;concept\nA;B\n", "missing column 'code', 'concept'"),
        ("", "cannot be read"),
        ("code,concept\nA,spo2\nA,heart_rate\n", "stand twice: 'A'"),
    ],
)
def test_a_file_that_is_no_map_is_refused_in_one_line(file, text, message):
    for read in (read_site_codes, read_synonyms):
        with pytest.raises(BadConfig, match=message) as caught:
            read(file(text))
        assert "\n" not in str(caught.value)
    with pytest.raises(BadConfig, match="cannot be read"):
        read_site_codes("no such file.csv")
