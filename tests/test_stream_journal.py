"""The state file of the stream: whatever is acknowledged survives a kill at any statement, and damage is told."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest

from feature_pipeline import BadConfig
from serving.stream.alerts import AlertBook, AlertSinks
from serving.stream.feed import Feed
from serving.stream.journal import PIECES, Journal
from serving.stream.processor import StreamProcessor
from serving.stream.visits import joined

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = json.loads((ROOT / "examples" / "new_patient_data.json").read_text())
USABLE = [row for row in EXAMPLE if row["observation_value"] is not None]


@pytest.fixture(scope="module")
def make(config_path, model_path):
    def make(**changes):
        return StreamProcessor(config_path, model_path, 1, **{"as_of": "last", **changes})

    return make


def feed_of(processor, state):
    return Feed(processor, AlertBook(), AlertSinks(), Journal(state), io.StringIO())


def given(feed):
    """(client, visit) -> the last score that was given."""
    results = [json.loads(line) for line in feed.results.getvalue().splitlines()]
    return {(r["client"], str(r["visit_id"])): r["sepsis_probability"] for r in results}


def scores_of(processor, state):
    """The scores of the visits that a state file has kept, whether they are due or not."""
    feed_of(processor, state).finish()
    return {key: processor.predict_visit(key[1], key[0])["sepsis_probability"] for key in processor.visits}


def at_once(pipeline, rows):
    scored = pipeline.predict(rows)
    visits = zip(scored["client"].astype(str), scored["visit_id"].astype(str), strict=True)
    return dict(zip(visits, scored["sepsis_probability"], strict=True))


def test_many_small_arrivals_are_kept_in_few_pieces(make, pipeline, tmp_path):
    feed = feed_of(make(), tmp_path / "state")
    for row in USABLE:
        feed.accept([row])
        feed.score()
    feed.finish()
    with contextlib.closing(sqlite3.connect(tmp_path / "state")) as db:
        [(rows, most)] = db.execute(
            "SELECT sum(n), max(n) FROM (SELECT count(*) AS n FROM entries WHERE kind = 'rows' GROUP BY visit)"
        )
    assert rows < len(USABLE) * 2 / 3 and most < 3 * PIECES
    assert scores_of(make(), tmp_path / "state") == at_once(pipeline, USABLE)


def test_space_of_visits_that_ended_is_used_again(make, tmp_path):
    processor = make(max_visits=8)
    feed = feed_of(processor, tmp_path / "state")
    sizes = []
    for copy in range(40):
        feed.accept([{**row, "visit_id": f"{row['visit_id']}-{copy}"} for row in USABLE])
        feed.score()
        with contextlib.closing(sqlite3.connect(tmp_path / "state")) as db:
            [(pages,)] = db.execute("PRAGMA page_count")
            sizes.append(pages)
    feed.finish()
    assert sizes[-1] <= sizes[4] * 1.5  # beside the marks of those that were dropped
    assert len(processor.visits) == 8 and scores_of(make(), tmp_path / "state").keys() == processor.visits.keys()


def test_codes_whose_place_is_used_again_keep_their_meaning(make, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.stream.processor.FORGETTABLE", 10)
    feed = feed_of(make(), tmp_path / "state")
    for n, row in enumerate(USABLE):
        junk = {**row, "visit_id": f"junk {n}", "observation_type_code": f"free text {n}"}
        feed.accept([junk, row])
        feed.score()
        feed.processor.clear_buffer(junk["visit_id"], junk["client"])
    assert len(feed.processor.codes) < 200 < len(USABLE)
    feed.finish()
    assert scores_of(make(), tmp_path / "state") == at_once(pipeline, USABLE)


def test_what_the_model_converts_is_kept_converted(make, tmp_path):
    row = {**USABLE[0], "observation_type_code": "Temp", "observation_value": 100.4, "unit": "[degF]"}
    feed = feed_of(make(), tmp_path / "state")
    feed.accept([row])
    feed.finish()
    processor = make()
    feed_of(processor, tmp_path / "state").finish()
    [visit] = processor.visits.values()
    assert joined(visit.rows)["value"].tolist() == [38.0]


# ------------------------------------------------------------------------------------------------------ killed


def killed_at(statement, files, state, rows, alerts):
    """A stream that takes some rows and kills itself before its SQLite statement number `statement`."""
    made, seen = sqlite3.connect, []

    def connect(*arguments, **options):
        database = made(*arguments, **options)

        def count(_):
            seen.append(1)
            if len(seen) > statement:
                os.kill(os.getpid(), 9)

        database.set_trace_callback(count)
        return database

    sqlite3.connect = connect
    processor = StreamProcessor(*files, 1, as_of="last")
    feed = Feed(processor, AlertBook(), AlertSinks(str(alerts)), Journal(state), io.StringIO())
    for start in range(0, len(rows), 40):
        feed.accept(rows[start : start + 40])
        with open(f"{state}.accepted", "w") as file:
            file.write(str(start + 40))
        feed.score()
    feed.finish()
    os._exit(0)


@pytest.mark.slow
def test_killed_before_any_statement_nothing_acknowledged_is_lost(make, pipeline, config_path, model_path, tmp_path):
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["pandas", "lightgbm", "serving.stream.feed"])
    kills = 0
    for statement in (*range(1, 12), *range(12, 400, 23)):
        state, alerts = tmp_path / f"state{statement}", tmp_path / f"alerts{statement}"
        arguments = (statement, (config_path, model_path), state, USABLE[:400], alerts)
        process = fork.Process(target=killed_at, args=arguments)
        process.start()
        process.join(60)
        kills += process.exitcode == -9
        accepted = Path(f"{state}.accepted")
        acknowledged = int(accepted.read_text()) if accepted.exists() else 0
        processor = make()
        feed = Feed(processor, AlertBook(), AlertSinks(str(alerts)), Journal(state), io.StringIO())
        feed.finish()
        found = {key: processor.predict_visit(key[1], key[0])["sepsis_probability"] for key in processor.visits}
        # the next 40 may have been kept without being acknowledged
        expected = [at_once(pipeline, USABLE[:n]) if n else {} for n in (acknowledged, min(acknowledged + 40, 400))]
        assert found in expected
        sent = [json.loads(line)["alert_id"] for line in alerts.read_text().splitlines()] if alerts.exists() else []
        high = {r for r in (pipeline.risk_level(p) for p in found.values()) if r == "HIGH"}
        assert bool(sent) >= bool(high)
        again = feed_of(make(), state)
        assert again.results.getvalue() == ""  # nothing is given twice
        again.finish()
    assert kills >= 15


# ----------------------------------------------------------------------------------------------------- damaged


@pytest.fixture(scope="module")
def states(make, tmp_path_factory):
    """A state file as a stop leaves it, and one as a kill leaves it, each in a folder; with the scores of both."""
    folder = tmp_path_factory.mktemp("states")
    (folder / "stopped").mkdir()
    (folder / "running").mkdir()
    feed = feed_of(make(), folder / "running" / "state")
    for start in range(0, len(USABLE) - 60, 60):
        feed.accept(USABLE[start : start + 60])
        feed.score()
    feed.accept(USABLE[-60:])
    shutil.copytree(folder / "running", folder / "killed")
    feed.score()
    feed.finish()
    for path in (folder / "running").iterdir():
        shutil.copy(path, folder / "stopped")
    scores = [scores_of(make(), shutil.copytree(folder / n, folder / f"{n}2") / "state") for n in ("stopped", "killed")]
    assert scores[0] == scores[1]
    return folder, scores[0]


def damaged(path, rng):
    content = bytearray(path.read_bytes())
    kind, place = rng.randrange(4), rng.randrange(len(content))
    if kind == 0:
        content[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        content[place : place + 512] = bytes(min(512, len(content) - place))
    elif kind == 2:
        del content[place:]
    else:
        content[place : place + 64] = rng.randbytes(min(64, len(content) - place))
    path.write_bytes(content)


def outcome(make, state, scores):
    """``told``, ``harmless``, or what went wrong."""
    processor = make()
    try:
        journal = Journal(state)
        try:
            Feed(processor, AlertBook(), AlertSinks(), journal, io.StringIO())
        finally:
            journal.close()
    except BadConfig as error:
        text = str(error)
        return "told" if str(state) in text and "\n" not in text and "never acknowledged" not in text else text
    found = {key: processor.predict_visit(key[1], key[0])["sepsis_probability"] for key in processor.visits}
    return "harmless" if found == scores else "other scores, in silence"


def trials(make, states, tmp_path, seeds):
    folder, scores = states
    outcomes = []
    for seed in seeds:
        rng = random.Random(seed)
        copy = shutil.copytree(folder / rng.choice(["stopped", "killed"]), tmp_path / str(seed))
        files = [path for path in copy.iterdir() if path.suffix != ".lock" and not path.name.endswith("-shm")]
        damaged(rng.choice(sorted(files)), rng)
        outcomes.append(outcome(make, copy / "state", scores))
        shutil.rmtree(copy)
    return outcomes


def test_damage_is_told_and_never_changes_a_score_in_silence(make, states, tmp_path):
    outcomes = trials(make, states, tmp_path, range(40))
    assert set(outcomes) <= {"told", "harmless"} and outcomes.count("told") >= 20


@pytest.mark.slow
def test_a_thousand_damages_are_told_or_harmless(make, states, tmp_path):
    outcomes = trials(make, states, tmp_path, range(1000, 1600))
    assert set(outcomes) <= {"told", "harmless"} and outcomes.count("told") >= 300


@pytest.mark.parametrize("lost", ["state", "state-wal"])
def test_a_part_that_is_lost_is_told(make, states, tmp_path, lost):
    folder, scores = states
    copy = shutil.copytree(folder / "killed", tmp_path / "copy")
    (copy / lost).write_bytes(b"")
    assert outcome(make, copy / "state", scores) == "told"


def test_a_file_that_was_moved_away_leaves_a_fresh_start(make, states, tmp_path):
    copy = shutil.copytree(states[0] / "killed", tmp_path / "copy")
    for name in ("state", "state-wal", "state-shm"):
        (copy / name).unlink()
    assert scores_of(make(), copy / "state") == {}
    assert scores_of(make(), copy / "state") == {}


def test_another_program_s_database_is_left_as_it_is(make, tmp_path):
    state = tmp_path / "state"
    with contextlib.closing(sqlite3.connect(state)) as db:
        db.execute("CREATE TABLE entries (x)")
    before = state.read_bytes()
    with pytest.raises(BadConfig, match="not a state file of this program"):
        feed_of(make(), state)
    assert state.read_bytes() == before


def test_a_durable_state_waits_for_the_disk_at_every_acknowledgement(make, tmp_path):
    for durable, level in ((True, 2), (False, 1)):
        feed = Feed(make(), AlertBook(), AlertSinks(), Journal(tmp_path / str(durable), durable), io.StringIO())
        [(found,)] = feed.journal.database.execute("PRAGMA synchronous")
        assert found == level
        feed.finish()


def test_the_log_is_brought_into_the_file_while_the_stream_goes_on(make, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.stream.journal.CHECKPOINT_PAGES", 50)
    feed = feed_of(make(), tmp_path / "state")
    for row in USABLE[:200]:
        feed.accept([row])
        feed.score()
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
    assert Path(f"{tmp_path}/state-wal").stat().st_size < 2_000_000
    feed.finish()
