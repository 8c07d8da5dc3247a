"""The log of every prediction that any of the serving scripts gives: what monitoring.py looks at.

A row holds no name and no value: the visit as a keyed hash, features as bins, codes as measured or not. Many processes
write to one database; a row is committed before the prediction is answered. SQLite by default, any SQLAlchemy URL.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
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

metadata = sa.MetaData()
predictions = sa.Table(
    "predictions",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
    sa.Column("time", sa.DateTime(), nullable=False, index=True),  # UTC
    sa.Column("source", sa.String(16), nullable=False),  # api, batch, database, stream
    sa.Column("model_version", sa.String(32), nullable=False),
    sa.Column("visit", sa.String(16), nullable=False, index=True),  # Pseudonyms.visit
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
            cursor.close()

    metadata.create_all(engine)
    return engine


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
        return letters.view(f"S{len(self.features)}").ravel().astype(str).tolist()

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


class PredictionLog:
    """Writes rows for one pipeline and one source. `open` makes one; a log that fails never stops the scoring."""

    def __init__(self, engine: sa.Engine | None, pipeline: ProductionPipeline, source: str):
        self._engine, self._pipeline, self._source = engine, pipeline, source
        self._profile = Profile(pipeline.config)
        self._pseudonyms = Pseudonyms.from_environment()
        self._failing = False
        if engine is not None and not self._pseudonyms.lasting:
            log.info("%s is not set: the prediction log cannot be joined to outcomes later", KEY_VARIABLE)

    @classmethod
    def open(cls, url: str | None, pipeline: ProductionPipeline, source: str) -> PredictionLog:
        """The log at `url` (None: the environment's, else `DEFAULT_URL`; ``off``: none) for what `source` scores."""
        url, engine = url_of(url), None
        if url != OFF:
            try:
                engine = open_engine(url)
            except (sa.exc.SQLAlchemyError, OSError, ImportError) as error:
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
            "time": datetime.now(UTC).replace(tzinfo=None),
            "source": self._source,
            "model_version": self._pipeline.model_version,
            "seconds": seconds,
        }
        levels = self._pipeline.risk_level(probability).tolist()
        rows = [
            {
                **shared,
                "visit": self._pseudonyms.visit(client, number),
                "score": score if score == score else None,
                "risk_level": level,
                "bins": bins,
                "codes": present,
                "unknown": others,
            }
            for client, number, score, level, bins, present, others in zip(
                clients, visits, probability.tolist(), levels, self._profile.bins(features), codes, unknown, strict=True
            )
        ]
        return self._write(predictions, rows)

    def record_error(self, kind: str, n: int = 1) -> bool:
        """Counts requests, files or visits that could not be scored."""
        if self._engine is None:
            return False
        row = {"source": self._source, "model_version": self._pipeline.model_version, "kind": kind, "n": n}
        return self._write(errors, [{"time": datetime.now(UTC).replace(tzinfo=None), **row}])

    def _write(self, table: sa.Table, rows: list[dict[str, Any]]) -> bool:
        try:
            with self._engine.begin() as connection:
                connection.execute(table.insert(), rows)
        except (sa.exc.SQLAlchemyError, OSError) as error:
            if not self._failing:  # once, not for every prediction
                log.error("error: the prediction log cannot be written: %s", type(error).__name__)
            self._failing = True
            return False
        if self._failing:
            log.warning("the prediction log is written again")
        self._failing = False
        return True

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
