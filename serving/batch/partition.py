"""One partition of a frame on many machines to its scores: what Dask, Spark or Ray call on their workers."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from common.pseudonyms import lasting_pseudonyms
from feature_pipeline import DEFAULT_CONFIG, DEFAULT_MODEL, ProductionPipeline, SiteCodes
from monitoring.log import OFF
from serving.batch.scoring import OUTPUT_TYPES, Moment, output_frame, scores_of
from serving.deployed import LAST, NOW, ServedModel

_served: dict[str, ServedModel] = {}  # of this process
_loading = threading.Lock()  # Dask's workers have threads


def score_partition(
    frame: pd.DataFrame,
    config_path: str | Path = DEFAULT_CONFIG,
    model_path: str | Path = DEFAULT_MODEL,
    *,
    as_of: str = LAST,
    codes: SiteCodes | None = None,
    monitor: str = OFF,
) -> pd.DataFrame:
    """The scores of the visits in `frame`, a row a visit, with the columns of a predictions file.

    `frame` holds observations (the seven columns, texts or typed) with all rows of its visits: a score of a part would
    be a wrong number, and nothing here can see it. An empty one gives an empty result of the same types. Each process
    loads config and model once, from paths that its machine has; name a version in ``models/archive/``, so that all
    use the same one. `as_of` is ``last`` (each visit's last observation), ``now`` or a time. `monitor` is the URL of a
    prediction log that all machines reach; it needs the same `SEPSIS_PSEUDONYM_KEY` on each.
    Raises `BadConfig`, `BadModel`, `BadObservations` (a column is missing).
    """
    if not len(frame):
        return output_frame(pa.schema({**OUTPUT_TYPES, "as_of": pa.int64()}).empty_table(), "", "")
    model = _model(config_path, model_path, codes, monitor)
    now = time.time()
    moment = Moment(as_of, now if as_of == NOW else None)
    observations = model.read(frame.reset_index(drop=True), moment.now)
    scores = scores_of(model, moment, observations, np.arange(observations.n_visits))
    told = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
    return output_frame(scores.visits, told, model.pipeline.model_version)


def _model(config_path: str | Path, model_path: str | Path, codes: SiteCodes | None, monitor: str) -> ServedModel:
    key = json.dumps([str(config_path), str(model_path), sorted((codes or {}).items()), monitor])
    with _loading:
        if key not in _served:
            if monitor != OFF:
                lasting_pseudonyms()  # raises: each process would log a visit under another hash
            _served[key] = ServedModel(ProductionPipeline(config_path, model_path, codes), "batch", monitor)
        return _served[key]
