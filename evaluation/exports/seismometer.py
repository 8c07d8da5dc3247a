"""A folder that seismometer opens (Epic's open validation suite, 0.5): predictions, events, and what they mean.

Clients and visits are pseudonyms. The .yml files are JSON, which is YAML. To open it, in an environment of its own (it
wants pandas below 3), in the folder: ``import seismometer; seismometer.run_startup(config_path=".")``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.alerts import Scored
from common.artifacts import write_json, write_tables
from common.pseudonyms import Pseudonyms
from evaluation.scoring import Past, judged_of
from evaluation.subgroups import Groups
from feature_pipeline import NO_TIME, Config

TARGET = "Sepsis"
SCORE = "sepsis_probability"


def write_seismometer(
    folder: Path, past: Past, scored: Scored, config: Config, groups: Groups, window_hours: float
) -> None:
    """Writes the folder. Left out are moments that are UNKNOWN, and those after onset unless the model knows such."""
    pseudonyms = Pseudonyms.from_environment()
    client = np.array([pseudonyms.client(c) for c, _ in past.keys], dtype=object)
    visit = np.array([pseudonyms.visit(c, v) for c, v in past.keys], dtype=object)
    known = np.zeros(len(scored.visit), dtype=bool)
    known[judged_of(scored, config).rows] = True
    known &= ~np.isnan(scored.probability)
    own = scored.visit[known]
    cohorts = {f"group_{i}": name for i, name in enumerate(groups)}
    predictions = pd.DataFrame(
        {
            "client": client[own],
            "visit": visit[own],
            "prediction_time": scored.time[known].astype("datetime64[us]"),
            SCORE: scored.probability[known],
            "risk_high": scored.high[known].astype(np.int8),
            **{
                column: np.where(groups[name] == "", "not known", groups[name])[own] for column, name in cohorts.items()
            },
        }
    )
    dated = past.stays.septic & (past.stays.onset != NO_TIME)
    events = pd.DataFrame(
        {
            "client": client[dated],
            "visit": visit[dated],
            "Type": TARGET,
            "EventTime": past.stays.onset[dated].astype("datetime64[us]"),
            "Value": 1.0,
        }
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o750)
    write_tables({folder / "predictions.parquet": predictions, folder / "events.parquet": events})
    for name, content in descriptions(config, cohorts, window_hours).items():
        write_json(folder / name, content)


def descriptions(config: Config, cohorts: dict[str, str], window_hours: float) -> dict[str, Any]:
    """The other files of the folder, by name."""
    levels = config.risk_thresholds
    version = config.model_version or "unversioned"
    windows = {f"{TARGET} in {hours:g} h": hours for hours in (config.snapshots.horizon_hours, window_hours)}
    events = [
        {
            "source": TARGET,
            "display_name": name,
            "window_hr": hours,
            "offset_hr": 0,
            "usage": "target",
            "aggregation_method": "max",
            "merge_strategy": "forward",
        }
        for name, hours in windows.items()
    ]
    meanings = {
        "client": ("object", "pseudonym of the client"),
        "visit": ("object", "pseudonym of the visit"),
        "prediction_time": ("datetime64[ns]", "moment that the score is of"),
        SCORE: ("float", f"probability of onset within {config.snapshots.horizon_hours:g} h"),
        "risk_high": ("int", "1 at risk level HIGH"),
        **{column: ("object", name) for column, name in cohorts.items()},
    }
    predictions = [
        {"name": name, "display_name": name, "dtype": dtype, "definition": text}
        for name, (dtype, text) in meanings.items()
    ]
    return {
        "config.yml": {
            "other_info": {
                "info_dir": ".",
                "data_dir": ".",
                "usage_config": "usage_config.yml",
                "event_definition": "event_dictionary.yml",
                "prediction_definition": "prediction_dictionary.yml",
                "prediction_path": "predictions.parquet",
                "event_path": "events.parquet",
                "metadata_path": "metadata.json",
            }
        },
        "usage_config.yml": {
            "data_usage": {
                "entity_id": "client",
                "context_id": "visit",
                "primary_output": SCORE,
                "primary_target": next(iter(windows)),
                "predict_time": "prediction_time",
                "event_table": {"type": "Type", "time": "EventTime", "value": "Value"},
                "cohorts": [{"source": column, "display_name": name} for column, name in cohorts.items()],
                "events": events,
            }
        },
        "event_dictionary.yml": {
            "events": [{"name": TARGET, "display_name": TARGET, "dtype": "int", "definition": "onset of sepsis"}]
        },
        "prediction_dictionary.yml": {"predictions": predictions},
        "metadata.json": {
            "modelname": f"sepsis risk {version}",
            "modelversion": version,
            "thresholds": [levels["high"], levels["medium"]],
        },
    }
