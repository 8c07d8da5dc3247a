"""Whole HL7 messages as they are sent, over MLLP: acknowledged, kept and left out as the table in
``hl7_messages.txt`` says. ``HL7_REWRITE=1`` writes what was found into the table, to be read before it is committed."""

import io
import os
import re
from pathlib import Path
from typing import NamedTuple

import hl7
import pytest

from feature_pipeline import ProductionPipeline, iso_times
from serving.stream import mllp
from serving.stream.alerts import AlertBook, AlertSinks
from serving.stream.feed import Feed
from serving.stream.hl7_mapping import read_hl7_mapping
from serving.stream.journal import Journal
from serving.stream.processor import StreamProcessor
from tests.test_stream import MllpServer

TABLE = Path(__file__).with_name("hl7_messages.txt")
DEVICES = {"147842": "heart_rate", "150456": "spo2", "150344": "temperature", "150017": "systolic_bp"}
DEVICES |= {"151562": "respiratory_rate"}


class Case(NamedTuple):
    name: str
    mapping: str  # JSON
    segments: list[str]
    expected: list[str]

    @property
    def text(self) -> str:
        visit = re.compile(r"^@(.*)$")
        pv1 = f"PV1|1|I|ICU^3^A{'|' * 16}"
        return "".join(visit.sub(lambda found: pv1 + found[1], segment) + "\r" for segment in self.segments)


def read_table():
    _, *blocks = re.split(r"^== ", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for block in blocks:
        name, *lines = block.strip().split("\n")
        mapping = lines.pop(0) if lines[0].startswith("{") else "{}"
        own = [line for line in lines if line.startswith("-> ")]
        yield Case(name, mapping, [line for line in lines if line not in own], own)


CASES = list(read_table())


@pytest.fixture(scope="module")
def pipeline(config_path, model_path):
    """With a site's map for the codes of its monitors."""
    return ProductionPipeline(config_path, model_path, {code: (name, "") for code, name in DEVICES.items()})


def kept(case: Case, pipeline, mapping) -> list[str]:
    """What the table says of a message."""
    try:
        records, left_out = mllp.observations_of(hl7.parse(case.text), pipeline, mapping)
    except mllp.Rejected as refused:
        return [f"-> {refused.code}: {refused}"]
    lines = [f"-> AA, not used: {len(left_out)}"]
    if not records:
        return lines
    read = pipeline.reproducer.read(records)
    for i in range(read.n_visits):
        for group in range(read.visit_group_start[i], read.visit_group_start[i + 1]):
            for row in range(read.group_start[group], read.group_start[group + 1]):
                time, code = iso_times(read.time[[row]])[0][11:16], read.codes[read.group_code[group]]
                lines.append(f"-> {read.client[i]} {read.visit_id[i]} {code} {read.value[row]:.6g} {time}")
    return lines + [f"-> set aside: {n} {reason}" for reason, n in sorted(read.set_aside.items())]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_a_message_gives(case, pipeline, tmp_path):
    (tmp_path / "mapping.json").write_text(case.mapping)
    found = kept(case, pipeline, read_hl7_mapping(tmp_path / "mapping.json"))
    if os.environ.get("HL7_REWRITE"):
        block = f"== {case.name}\n" + ("" if case.mapping == "{}" else f"{case.mapping}\n") + "\n".join(case.segments)
        text, old = TABLE.read_text(encoding="utf-8"), "\n".join([block, *case.expected])
        assert old + "\n" in text
        TABLE.write_text(text.replace(old + "\n", "\n".join([block, *found]) + "\n"), encoding="utf-8")
    else:
        assert found == case.expected


def test_the_table_is_answered_over_mllp(config_path, model_path, pipeline, tmp_path):
    """Those of the usual mapping, over one connection each."""
    usual = [case for case in CASES if case.mapping == "{}"]
    assert len(CASES) >= 60
    feed = Feed(
        StreamProcessor(config_path, model_path, codes={code: (name, "") for code, name in DEVICES.items()}),
        AlertBook(),
        AlertSinks(),
        Journal(tmp_path / "state.db"),
        io.StringIO(),
    )
    server = MllpServer(feed)
    try:
        codes = {case.name: str(server.send(case.text).segment("MSA")(1)) for case in usual}
    finally:
        server.end()
        feed.journal.close()
    assert codes == {case.name: case.expected[0][3:5] for case in usual}
    records = [mllp.observations_of(hl7.parse(case.text), pipeline)[0] for case in usual if codes[case.name] == "AA"]
    assert feed.accepted == sum(map(len, records)) > 80
