"""The rows of the prediction log, what is found in them, and how the service performs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import sqlalchemy as sa
from pyarrow import csv

from feature_pipeline import RISK_LEVELS
from monitoring.log import cards, errors, predictions
from monitoring.profile import AT_END, DURING, Profile, effective_size

FEWEST_FAILED = 5  # failed or UNKNOWN predictions; below, they are not judged
FEWEST_PERIODS, MOST_PERIODS = 2, 4  # of history, with which the volume is compared
MOST_UNKNOWN = 0.5  # share of predictions
AT_ONCE = 20_000  # rows of the log
_ARROW = {sa.Integer: pa.int64(), sa.Float: pa.float64()}  # by the affinity of a column of the log; else text
_DTYPES = ("i8", "u8", "M8[us]", "M8[us]", "f8", "f8", "i4", "i1", "i4")  # of the columns of `Scores`, as they are read


@dataclass
class Scores:
    """What a log has of each prediction, but for the letters of its bins and codes; arrays in order of `id`, and the
    `kinds` (source, risk level, reason, model version) that `kind` gives the place of."""

    id: np.ndarray
    visit: np.ndarray  # hash
    as_of: np.ndarray  # datetime64[us]
    time: np.ndarray  # datetime64[us]
    score: np.ndarray  # NaN if UNKNOWN
    seconds: np.ndarray
    n: np.ndarray  # predictions that the row counts
    at_newest: np.ndarray  # is it for the time of the newest observation?
    has_bins: np.ndarray  # of the profile
    kind: np.ndarray
    kinds: pd.DataFrame

    def of(self, rows: np.ndarray) -> Scores:
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "kinds"}
        return Scores(**arrays, kinds=self.kinds)

    def is_kind(self, name: str, value: str) -> np.ndarray:
        return self.kinds[name].eq(value).to_numpy(dtype=bool)[self.kind]

    def counted(self, name: str) -> str:
        """The number of predictions by `name`, in words."""
        of_kind = np.bincount(self.kind, self.n, len(self.kinds)).astype(np.int64)
        counts = pd.Series(of_kind).groupby(self.kinds[name].to_numpy()).sum().sort_values(ascending=False)
        return ", ".join(f"{n:,} {value}" for value, n in counts.items() if n)


def _condition(since: datetime | None, until: datetime, version: str | None) -> sa.ColumnElement[bool]:
    """Predictions with ``since < time <= until``: all of one model version, or those that were shown."""
    shown = predictions.c.shadow.is_(False)
    period = [predictions.c.time <= until, *([predictions.c.time > since] if since is not None else [])]
    return sa.and_(*period, shown if version is None else predictions.c.model_version == version)


def _columns(engine: sa.Engine, condition: Any, *columns: sa.ColumnElement[Any]) -> Iterator[tuple[pa.Array, ...]]:
    """The columns of the log's rows, some thousands at a time; none of them may be NULL.

    SQLite gives many rows as one text, which Arrow parses: Python would take four times as long with value by value.
    """
    if engine.dialect.name == "sqlite":
        yield from _concatenated(engine, condition, *columns)
        return
    query = sa.select(*(sa.type_coerce(column, sa.types.NullType()) for column in columns)).where(condition)
    with engine.connect() as connection:
        options = connection.execution_options(stream_results=True, max_row_buffer=AT_ONCE)
        for rows in options.execute(query).partitions(AT_ONCE):
            yield tuple(pa.array(column) for column in zip(*rows, strict=True))


def _concatenated(engine: sa.Engine, condition: Any, *columns: sa.ColumnElement[Any]) -> Iterator[tuple[pa.Array, ...]]:
    kinds = [_ARROW.get(column.type._type_affinity, pa.string()) for column in columns]
    texts = [
        sa.func.printf("%!.17g", column) if kind == pa.float64() else sa.cast(column, sa.Text)
        for column, kind in zip(columns, kinds, strict=True)
    ]
    row = reduce(lambda before, text: before.op("||")("\x1f").op("||")(text), texts)
    id = predictions.c.id
    query = sa.select(sa.func.group_concat(row, "\n")).where(
        condition, id.between(sa.bindparam("a"), sa.bindparam("b"))
    )
    names = [str(i) for i in range(len(columns))]
    how = (
        csv.ParseOptions(delimiter="\x1f", quote_char=False),
        csv.ConvertOptions(column_types=dict(zip(names, kinds, strict=True)), strings_can_be_null=False),
    )
    with engine.connect() as connection:
        first, last = connection.execute(sa.select(sa.func.min(id), sa.func.max(id)).where(condition)).one()
        for start in range(first or 0, (last or -1) + 1, AT_ONCE):
            text = connection.execute(query, {"a": start, "b": start + AT_ONCE - 1}).scalar()
            if text is not None:
                table = csv.read_csv(pa.BufferReader(text.encode()), csv.ReadOptions(column_names=names), *how)
                yield tuple(column.combine_chunks() for column in table.columns)


def _values(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)


def read_scores(
    engine: sa.Engine, since: datetime | None, until: datetime, version: str | None = None, n_bins: int = 0
) -> Scores:
    """The log's predictions with ``since < time <= until``: all of one model version, or those that were shown.
    `n_bins`: how many bins those of the profile have."""
    c = predictions.c
    flags = sa.case((c.as_of == c.newest, 1), else_=0) + sa.case((sa.func.length(c.bins) == n_bins, 2), else_=0)
    as_of, score = sa.func.coalesce(c.as_of, c.time), sa.func.coalesce(c.score, sa.literal_column("-1.0"))
    columns = c.id, c.visit, as_of, c.time, score, c.seconds, c.n, flags
    names = c.source, c.risk_level, sa.func.coalesce(c.reason, sa.literal_column("''")), c.model_version
    kinds: defaultdict[tuple[Any, ...], int] = defaultdict()
    kinds.default_factory = kinds.__len__
    parts: list[list[np.ndarray]] = [[np.empty(0, dtype)] for dtype in _DTYPES]
    for id, visit, *values, flag, a, b, d, e in _columns(engine, _condition(since, until, version), *columns, *names):
        values[:2] = [time.cast(pa.timestamp("us")) for time in values[:2]]
        hashes = pd.util.hash_array(_values(visit), categorize=False)
        kind = np.zeros(len(id), dtype=np.int64)
        for name in (a, b, d, e):
            encoded = name.dictionary_encode()
            kind = kind * len(encoded.dictionary) + _values(encoded.indices)
        _, first, kind = np.unique(kind, return_index=True, return_inverse=True)
        kind = np.array([kinds[tuple(name[i].as_py() or None for name in (a, b, d, e))] for i in first.tolist()])[kind]
        for part, column, dtype in zip(parts, (id, hashes, *values, flag, kind), _DTYPES, strict=True):
            part.append((column if isinstance(column, np.ndarray) else _values(column)).astype(dtype))
    arrays = []
    while parts:  # each goes when it was joined
        arrays.append(np.concatenate(parts.pop(0)))
    arrays[4][arrays[4] < 0] = np.nan
    flag = arrays.pop(7)
    arrays[7:7] = [(flag & 1).astype(bool), (flag & 2).astype(bool)]
    found = Scores(*arrays, pd.DataFrame(list(kinds), columns=["source", "risk_level", "reason", "model_version"]))
    return found if (np.diff(found.id) > 0).all() else found.of(np.argsort(found.id))


def distributions(
    engine: sa.Engine, since: datetime | None, until: datetime, version: str, scores: Scores, profile: Profile
) -> dict[str, dict[str, Any]]:
    """Of predictions of one model version the distribution for each kind of moments; `scores` has those of the period.

    A visit that was scored once, for the time of its newest observation, was scored at its end; others were scored
    during the stay. There every visit-hour with a score counts once: however often a visit is scored, and however long
    the period, these are shares of patient-hours, as the snapshots of training are.
    """
    usable = ~np.isnan(scores.score) & scores.has_bins & scores.is_kind("model_version", version)
    order = np.lexsort((scores.as_of, scores.visit))
    order = order[usable[order]]
    visit, hour = scores.visit[order], scores.as_of[order]
    other = _first(visit)
    kept = other | _first(hour)  # of one moment only the first
    order, visit, other = order[kept], visit[kept], other[kept]
    hour = hour[kept].astype("datetime64[h]")

    def size(first: np.ndarray) -> np.ndarray:
        """Of each row the number of rows of its group; `first` says where groups begin."""
        n = np.diff(np.append(np.flatnonzero(first), len(first)))
        return np.repeat(n, n)

    weight = 1 / size(other | _first(hour))
    once = (size(other) == 1) & scores.at_newest[order]
    weights = {DURING: np.zeros(len(scores.id)), AT_END: np.zeros(len(scores.id))}
    n_visits = {}
    for moments, chosen in ((DURING, ~once), (AT_END, once)):
        weights[moments][order[chosen]] = weight[chosen]
        if chosen.any():
            of_visit = np.add.reduceat(weight[chosen], np.flatnonzero(_first(visit[chosen])))
            n_visits[moments] = effective_size(of_visit)
    if not n_visits:
        return {}
    shares = {moments: profile.shares() for moments in n_visits}
    c = predictions.c
    for id, bins, codes, unknown in _columns(
        engine, _condition(since, until, version), c.id, c.bins, c.codes, c.unknown
    ):
        place = np.searchsorted(scores.id, _values(id))
        place[place == len(scores.id)] = 0
        known = scores.id[place] == _values(id)
        for moments, part in shares.items():
            w = np.where(known, weights[moments][place], 0.0)
            rows = np.flatnonzero(w)
            if len(rows):
                some = (column.take(pa.array(rows)) for column in (bins, codes))
                part.add(scores.score[place[rows]], *some, _values(unknown)[rows], w[rows])
    return {moments: part.distribution(n_visits[moments]) for moments, part in shares.items()}


def _first(values: np.ndarray) -> np.ndarray:
    return np.append(True, values[1:] != values[:-1])[: len(values)]


def read_rows(
    engine: sa.Engine,
    since: datetime | None,
    until: datetime,
    version: str | None = None,
    columns: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The log's predictions with ``since < time <= until``: all of one model version, or those that were shown. All
    `columns`, if not some are named."""
    chosen = [predictions.c[name] for name in columns] if columns else [predictions]
    query = sa.select(*chosen).where(_condition(since, until, version)).order_by(predictions.c.id)
    return _frame(engine, query)


def _frame(engine: sa.Engine, query: sa.Select[Any]) -> pd.DataFrame:
    with engine.connect() as connection:
        parts = pd.read_sql(query, connection.execution_options(stream_results=True), chunksize=AT_ONCE)
        rows = pd.concat(parts, ignore_index=True)
    times = [name for name in ("time", "as_of", "newest") if name in rows]
    return rows.astype(dict.fromkeys(times, "datetime64[us]"))  # also where there are none


def read_challengers(engine: sa.Engine, since: datetime, until: datetime) -> pd.DataFrame:
    """The predictions in the shadow of all versions that ran there with ``since < time <= until``, and before."""
    shadow = sa.select(predictions).where(predictions.c.shadow.is_(True), predictions.c.time <= until)
    recent = sa.select(predictions.c.model_version).where(predictions.c.shadow.is_(True), predictions.c.time > since)
    return _frame(engine, shadow.where(predictions.c.model_version.in_(recent)))


@dataclass
class Findings:
    """What was found in the log: tables for a person, and warnings, one line each.

    (They are not called alerts: an alert is a HIGH risk of a patient.)
    """

    warnings: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    drift: dict[str, pd.DataFrame] = field(default_factory=dict)  # by heading
    service: dict[str, Any] = field(default_factory=dict)
    score: tuple[list[float], list[float], list[float]] | None = None  # edges, expected, actual shares
    quality: pd.DataFrame = field(default_factory=pd.DataFrame)
    calibration: pd.DataFrame = field(default_factory=pd.DataFrame)
    challengers: dict[str, pd.DataFrame] = field(default_factory=dict)  # in the shadow, by heading
    daily: pd.DataFrame = field(default_factory=pd.DataFrame)
    answers: pd.DataFrame = field(default_factory=pd.DataFrame)


def read_counts(engine: sa.Engine, since: datetime, until: datetime, days: int) -> tuple[int, list[tuple[int, int]]]:
    """What failed in ``since < time <= until``, and (predictions, visits) of each of the periods of `days` before,
    at most `MOST_PERIODS`, that the log covers wholly. All model versions."""
    failed = sa.select(sa.func.coalesce(sa.func.sum(errors.c.n), 0))
    sums = sa.func.coalesce(sa.func.sum(predictions.c.n), 0)
    counts = sa.select(sums, sa.func.count(predictions.c.visit.distinct()))
    counts = counts.where(predictions.c.shadow.is_(False))
    with engine.connect() as connection:
        n = connection.scalar(failed.where((errors.c.time > since) & (errors.c.time <= until)))
        first = connection.scalar(sa.select(sa.func.min(predictions.c.time)))
        covered = (since - first) // timedelta(days=days) if first else 0
        earlier = []
        for k in range(min(covered, MOST_PERIODS)):
            end = since - timedelta(days=k * days)
            period = (predictions.c.time > end - timedelta(days=days)) & (predictions.c.time <= end)
            earlier.append(tuple(map(int, connection.execute(counts.where(period)).one())))
    return int(n), earlier


def look_at_answers(findings: Findings, engine: sa.Engine, since: datetime, until: datetime) -> None:
    """How clinicians answered the cards that were given in ``since < time <= until``: of each risk level the number of
    cards, of answers, and of reasons of those that were overridden. All model versions."""
    query = sa.select(cards.c.risk_level, cards.c.outcome, cards.c.reason)
    with engine.connect() as connection:
        rows = pd.read_sql(query.where(cards.c.time > since, cards.c.time <= until), connection)
    table = []
    for level in [name for name in RISK_LEVELS if name in set(rows["risk_level"])]:
        own = rows[rows["risk_level"] == level]
        overridden = own[own["outcome"] == "overridden"]
        reasons = overridden["reason"].fillna("none given").value_counts()
        table.append(
            {
                "risk_level": level,
                "cards": len(own),
                "accepted": int((own["outcome"] == "accepted").sum()),
                "overridden": len(overridden),
                "not_answered": int(own["outcome"].isna().sum()),
                "reasons": ", ".join(f"{n:,} {reason}" for reason, n in reasons.items()),
            }
        )
    findings.answers = pd.DataFrame(table)


def look_at_service(
    findings: Findings, rows: Scores, failed: int, earlier: list[tuple[int, int]], days: int, most_seconds: float
) -> None:
    """Volume, latency, errors of all model versions; `failed` and `earlier` as `read_counts` gives them."""
    n = int(rows.n.sum())
    median, p95 = np.quantile(rows.seconds, [0.5, 0.95]).tolist() if n else (float("nan"),) * 2
    rate = failed / max(n + failed, 1)
    unknown, visits = int(rows.n[np.isnan(rows.score)].sum()), len(pd.unique(rows.visit))
    alerted = len(pd.unique(rows.visit[rows.is_kind("risk_level", "HIGH")]))

    findings.service = {
        "predictions": f"{n:,} of {visits:,} visits in {days} days",
        "risk levels": rows.counted("risk_level"),
        "reasons of UNKNOWN": rows.counted("reason"),
        "visits alerted (HIGH)": f"{alerted:,} ({alerted / max(visits, 1):.1%})",
        "sources": rows.counted("source"),
        "model versions": rows.counted("model_version"),
        "latency": f"median {median * 1e3:.1f} ms, p95 {p95 * 1e3:.1f} ms" if n else "",
        "errors": f"{failed:,} ({rate:.2%})",
    }
    if not n:
        findings.warnings.append(f"no prediction in {days} days")
    elif len(earlier) >= FEWEST_PERIODS:
        usual, usual_visits = np.median(np.array(earlier), axis=0)
        # visits come by chance, each with several predictions
        by_chance = 5 * np.sqrt(usual * (usual / max(usual_visits, 1)) * (1 + 1 / len(earlier)))
        if usual >= 20 and abs(n - usual) > max(0.5 * usual, by_chance):
            findings.warnings.append(f"volume: {n:,} predictions, usually {usual:,.0f} in {days} days")
    if unknown >= FEWEST_FAILED and unknown / n > MOST_UNKNOWN:
        why = f": {reasons}" if (reasons := rows.counted("reason")) else ""
        findings.warnings.append(f"the risk is UNKNOWN in {unknown:,} of {n:,} predictions{why}")
    if p95 > most_seconds:
        findings.warnings.append(f"latency: p95 is {p95:.2f} s, allowed {most_seconds:g} s")
    if failed >= FEWEST_FAILED and rate > 0.05:
        findings.warnings.append(f"errors: {rate:.1%} of the requests, files and visits could not be scored")
    if n:
        day = rows.time.astype("datetime64[D]").astype("datetime64[us]")
        by_day = pd.DataFrame({"day": day, "n": rows.n, "seconds": rows.seconds}).groupby("day")
        daily = {"predictions": by_day["n"].sum(), "p95_seconds": by_day["seconds"].quantile(0.95)}
        findings.daily = pd.DataFrame(daily).reset_index()
