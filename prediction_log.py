"""The log of every prediction that any of the serving scripts gives: what monitoring.py looks at.

A row holds no name and no value: the visit as a keyed hash, features as bins, codes as measured or not. Many processes
write to one database; a row is committed before the prediction is answered. SQLite by default, any SQLAlchemy URL.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from command_line import log
from feature_pipeline import Observations, ProductionPipeline
from pseudonyms import KEY_VARIABLE, Pseudonyms

URL_VARIABLE = "SEPSIS_MONITOR_URL"
DEFAULT_URL = "sqlite:///data/predictions.db"
OFF = "off"
OPENING_TRIES = 8
WAL_PAGES = 16_000  # of SQLite's write-ahead log, 64 MB: each checkpoint waits for the disk

metadata = sa.MetaData()
predictions = sa.Table(
    "predictions",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
    sa.Column("time", sa.DateTime(), nullable=False, index=True),  # UTC
    sa.Column("source", sa.String(16), nullable=False),  # api, batch, database, stream
    sa.Column("model_version", sa.String(32), nullable=False),
    sa.Column("visit", sa.String(16), nullable=False),  # Pseudonyms.visit
    sa.Column("as_of", sa.DateTime()),  # the observations' time that the score is of
    sa.Column("score", sa.Double()),  # empty where nothing was usable
    sa.Column("risk_level", sa.String(8), nullable=False),
    sa.Column("bins", sa.Text(), nullable=False),  # a letter for each feature of the profile: a, b, ..., - for empty
    sa.Column("codes", sa.Text(), nullable=False),  # for each of the model's codes 1 where the visit has it, else 0
    sa.Column("unknown", sa.Integer(), nullable=False),  # observations of codes that the model does not know
    sa.Column("seconds", sa.Double(), nullable=False),  # of the call that gave it
)
errors = sa.Table(
    "prediction_errors",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
    sa.Column("time", sa.DateTime(), nullable=False, index=True),
    sa.Column("source", sa.String(16), nullable=False),
    sa.Column("model_version", sa.String(32), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("n", sa.Integer(), nullable=False),
)
_NEW_PREDICTION, _NEW_ERROR = predictions.insert(), errors.insert()  # made once: they keep what they are compiled to


def open_engine(url: str) -> sa.Engine:
    """An engine whose tables exist. SQLite is set so that processes wait for one another, and readers for nobody."""
    address = sa.make_url(url)
    sqlite = address.get_backend_name() == "sqlite"
    if sqlite and address.database and address.database != ":memory:":
        folder = Path(address.database).parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)
        os.close(os.open(address.database, os.O_CREAT | os.O_WRONLY, 0o600))
    engine = sa.create_engine(address, pool_pre_ping=not sqlite)
    if sqlite:

        @sa.event.listens_for(engine, "connect")
        def _on_connect(connection: Any, _: Any) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA busy_timeout = 10000")
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing
            cursor.execute(f"PRAGMA wal_autocheckpoint = {4 * WAL_PAGES}")  # should `_checkpoint` not come to it
            cursor.close()

    for attempt in range(OPENING_TRIES):
        try:
            metadata.create_all(engine)
            return engine
        except (sa.exc.DBAPIError, sqlite3.OperationalError):  # another process makes the same tables just now
            if attempt == OPENING_TRIES - 1:
                engine.dispose()
                raise
            time.sleep(0.05 * (attempt + 1))
    raise AssertionError("unreachable")


def url_of(url: str | None) -> str:
    """The URL that is meant: the one given, else of the environment, else the default."""
    return url or os.environ.get(URL_VARIABLE) or DEFAULT_URL


class Profile:
    """The features whose distribution is watched, with the edges of their bins, and the model's codes.

    From the config's ``reference_profile``, which training writes; a config without one gives rows without bins.
    """

    def __init__(self, config: Mapping[str, Any]):
        features = (config.get("reference_profile") or {}).get("features", {})
        place = {name: i for i, name in enumerate(config["feature_names"])}
        self.features = [name for name in features if name in place]
        self.codes: list[str] = list(config["codes"])
        self._columns = np.array([place[name] for name in self.features], dtype=np.int64)
        most = max((len(features[name]["edges"]) for name in self.features), default=0)
        self._edges = np.full((len(self.features), most), np.inf)
        for row, name in zip(self._edges, self.features, strict=True):
            row[: len(features[name]["edges"])] = features[name]["edges"]

    def bins(self, features: np.ndarray) -> list[str]:
        """One text a row of ``features`` (n, n_features): the letter of each watched feature's bin."""
        if not self.features:
            return [""] * len(features)
        values = features[:, self._columns]
        letters = (values[:, :, None] >= self._edges).sum(axis=2).astype(np.uint8) + ord("a")
        letters[np.isnan(values)] = ord("-")
        return np.ascontiguousarray(letters).view(f"S{len(self.features)}").ravel().astype(str).tolist()

    def present(self, observations: Observations, visit: np.ndarray, as_of: np.ndarray) -> tuple[list[str], list[int]]:
        """For each snapshot which of the model's codes it has (a text of 0 and 1), and how many observations of
        other codes."""
        place = {code: i for i, code in enumerate(self.codes)}
        column = np.array([place.get(code, -1) for code in observations.codes], dtype=np.int64)
        first_group = observations.visit_group_start[visit]
        n_groups = observations.visit_group_start[visit + 1] - first_group
        snapshot = np.repeat(np.arange(len(visit)), n_groups)
        group = np.arange(n_groups.sum()) + np.repeat(first_group - (np.cumsum(n_groups) - n_groups), n_groups)
        known = observations.time[observations.group_start[group]] <= as_of[snapshot]
        snapshot, group = snapshot[known], group[known]
        own = column[observations.group_code[group]]
        has = np.full((len(visit), max(len(self.codes), 1)), ord("0"), dtype=np.uint8)
        has[snapshot[own >= 0], own[own >= 0]] = ord("1")
        foreign = group[own < 0]
        length = observations.group_start[foreign + 1] - observations.group_start[foreign]
        unknown = np.bincount(snapshot[own < 0], weights=length, minlength=len(visit)).astype(int)
        return has.view(f"S{has.shape[1]}").ravel().astype(str).tolist(), unknown.tolist()


WATCHED = 20
_SAMPLE = 50_000


def visit_weights(visit: np.ndarray) -> np.ndarray:
    """A weight for each row such that every visit counts once, however often it is scored."""
    _, own, count = np.unique(visit, return_inverse=True, return_counts=True)
    return 1 / count[own]


def bin_shares(letters: np.ndarray, n_bins: int, weights: np.ndarray) -> list[float]:
    """Weighted shares of the bins, that of the empty ones last. `letters` (n,) are bytes as `Profile.bins` has them."""
    place = np.where(letters == ord("-"), n_bins, letters.astype(np.int64) - ord("a"))
    shares = np.bincount(place, weights=weights, minlength=n_bins + 1) / weights.sum()
    return [round(float(share), 6) for share in shares]


def make_profile(
    config: Mapping[str, Any],
    features: np.ndarray,
    probability: np.ndarray,
    observations: Observations,
    visit: np.ndarray,
    as_of: np.ndarray,
) -> dict[str, Any]:
    """The config's ``reference_profile``: how scores, features and codes are distributed in training.

    `features` (n_features, n_snapshots) are not filled yet, `probability` (n_snapshots,) out-of-fold. Watched are the
    features that go with the score the most (by correlation), and every code's latest value. Bins are tenths; every
    visit counts once.
    """
    some = np.unique(np.linspace(0, len(visit) - 1, min(len(visit), _SAMPLE)).astype(int))
    features = features[:, some]
    if (fill := config.get("fill_value")) is not None:
        features[np.isnan(features)] = fill
    score = np.log(np.clip(probability[some], 1e-9, 1 - 1e-9) / (1 - np.clip(probability[some], 1e-9, 1 - 1e-9)))
    strength = []
    for row in features:
        known = ~np.isnan(row)
        x, y = row[known], score[known]
        varies = len(x) > 10 and x.std() > 1e-12 and y.std() > 1e-12
        strength.append(abs(np.corrcoef(x, y)[0, 1]) * known.mean() if varies else 0.0)
    strongest = [int(i) for i in np.argsort(-np.array(strength), kind="stable")[:WATCHED] if strength[i] > 0]
    names = config["feature_names"]
    latest = [i for i, name in enumerate(names) if name.endswith("__last") and strength[i] > 0]
    chosen = sorted({*strongest, *latest})
    tenths = np.arange(0.1, 0.95, 0.1)

    def edges(values: np.ndarray) -> list[float]:
        values = values[~np.isnan(values)]
        # an edge at the smallest value would leave the first bin empty
        return [float(edge) for edge in np.unique(np.quantile(values, tenths)) if edge > values.min()]

    watched = {names[i]: {"edges": edges(features[i])} for i in chosen}
    own = Profile({**config, "reference_profile": {"features": watched}})
    weights = visit_weights(visit[some])
    letters = letters_of(own.bins(features.T), len(watched))
    for name, column in zip(own.features, letters.T, strict=True):
        watched[name]["shares"] = bin_shares(column, len(watched[name]["edges"]) + 1, weights)
    score_edges = edges(probability[some])
    score_letters = np.searchsorted(score_edges, probability[some], side="right") + ord("a")
    present, unknown = own.present(observations, visit[some], as_of[some])
    has = letters_of(present, len(own.codes)) == ord("1")
    return {
        "n_visits": len(np.unique(visit[some])),
        "features": watched,
        "score": {"edges": score_edges, "shares": bin_shares(score_letters, len(score_edges) + 1, weights)},
        "codes": {
            code: round(float((column * weights).sum() / weights.sum()), 6)
            for code, column in zip(own.codes, has.T, strict=True)
        },
        "unknown": round(float(((np.array(unknown) > 0) * weights).sum() / weights.sum()), 6),
    }


def letters_of(texts: list[str], width: int) -> np.ndarray:
    """(n, width) bytes of texts that all have `width` letters."""
    return np.frombuffer("".join(texts).encode("ascii"), dtype=np.uint8).reshape(len(texts), width)


class PredictionLog:
    """Writes rows for one pipeline and one source. `open` makes one; a log that fails never stops the scoring."""

    def __init__(
        self,
        engine: sa.Engine | None,
        pipeline: ProductionPipeline,
        source: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):
        self._clock = clock
        self._engine, self._pipeline, self._source = engine, pipeline, source
        self._profile = Profile(pipeline.config)
        self._pseudonyms = Pseudonyms.from_environment()
        self._failing = False
        self._pages, self._checkpointing = 0, threading.Lock()
        if engine is not None and not self._pseudonyms.lasting:
            log.info("%s is not set: the prediction log cannot be joined to outcomes later", KEY_VARIABLE)

    @classmethod
    def open(cls, url: str | None, pipeline: ProductionPipeline, source: str) -> PredictionLog:
        """The log at `url` (None: the environment's, else `DEFAULT_URL`; ``off``: none) for what `source` scores."""
        url, engine = url_of(url), None
        if url != OFF:
            try:
                engine = open_engine(url)
            except (sa.exc.SQLAlchemyError, sqlite3.Error, OSError, ImportError, ValueError) as error:
                log.error("error: the prediction log cannot be opened: %s", type(error).__name__)
        return cls(engine, pipeline, source)

    def record(
        self,
        observations: Observations,
        visit: np.ndarray,
        as_of: np.ndarray,
        probability: np.ndarray,
        features: np.ndarray,
        seconds: float,
    ) -> bool:
        """Writes one row a snapshot, all in one transaction, before it returns. False where that was not possible.

        `probability` and `features` are what `ProductionPipeline.evaluate` gave for these snapshots, `seconds` how
        long the call took.
        """
        if self._engine is None or not len(visit):
            return self._engine is not None
        clients, visits = observations.client_text[visit].tolist(), observations.visit_text[visit].tolist()
        codes, unknown = self._profile.present(observations, visit, as_of)
        shared = {
            "time": self._clock().replace(tzinfo=None),
            "source": self._source,
            "model_version": self._pipeline.model_version,
            "seconds": seconds,
        }
        levels = self._pipeline.risk_level(probability).tolist()
        moments = as_of.astype("datetime64[us]").astype(object)  # datetime, None for none
        rows = [
            {
                **shared,
                "visit": self._pseudonyms.visit(client, number),
                "as_of": moment,
                "score": score if score == score else None,
                "risk_level": level,
                "bins": bins,
                "codes": present,
                "unknown": others,
            }
            for client, number, moment, score, level, bins, present, others in zip(
                clients,
                visits,
                moments,
                probability.tolist(),
                levels,
                self._profile.bins(features),
                codes,
                unknown,
                strict=True,
            )
        ]
        return self._write(_NEW_PREDICTION, rows)

    def record_error(self, kind: str, n: int = 1) -> bool:
        """Counts requests, files or visits that could not be scored."""
        if self._engine is None:
            return False
        row = {"source": self._source, "model_version": self._pipeline.model_version, "kind": kind, "n": n}
        return self._write(_NEW_ERROR, [{"time": self._clock().replace(tzinfo=None), **row}])

    def _write(self, statement: sa.Insert, rows: list[dict[str, Any]]) -> bool:
        try:
            with self._engine.begin() as connection:
                connection.execute(statement, rows)
        except (sa.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
            if not self._failing:  # once, not for every prediction
                log.error("error: the prediction log cannot be written: %s", type(error).__name__)
            self._failing = True
            return False
        if self._failing:
            log.warning("the prediction log is written again")
        self._failing = False
        if self._engine.dialect.name == "sqlite":
            self._pages += 3 + len(rows) // 10  # about so many go to the write-ahead log
            if self._pages >= WAL_PAGES and self._checkpointing.acquire(blocking=False):
                self._pages = 0
                threading.Thread(target=self._checkpoint, daemon=True).start()
        return True

    def _checkpoint(self) -> None:
        """Brings the write-ahead log into the database. Left to SQLite, a request would wait for the disk meanwhile."""
        try:
            with self._engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")
        except sa.exc.SQLAlchemyError:  # it is tried again later
            pass
        finally:
            self._checkpointing.release()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
