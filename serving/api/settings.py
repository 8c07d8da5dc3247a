"""What differs between machines: from environment variables, or from the options of api_server.py."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from feature_pipeline import DEFAULT_CONFIG, DEFAULT_MODEL, BadConfig

PREFIX = "SEPSIS_"


@dataclass(frozen=True)
class Settings:
    """Each field is read from the environment variable ``SEPSIS_<FIELD>``."""

    config: str = DEFAULT_CONFIG
    model: str = DEFAULT_MODEL
    codes: str = ""  # a site map of codes, CSV code,concept[,unit]
    api_keys: str = ""  # a file of `python api_server.py --new-key` lines, or such lines separated by commas
    cds_clients: str = ""  # a JSON file of the CDS Hooks clients whose signed calls are trusted
    fhir_servers: str = ""  # base URLs that a CDS Hooks call's missing data may be fetched from, with commas between
    cors_origins: str = ""  # browsers' origins that may ask CDS Hooks, separated by commas
    insecure: bool = False  # open to everybody, without keys
    rate_limit: str = "1200/minute"  # of each key, or of each address where there is none
    rate_storage: str = ""  # all workers of this machine count together; redis://HOST:6379 counts for several machines
    max_bytes: int = 8 * 1024 * 1024  # of a request
    max_rows: int = 100_000  # observations of a request
    max_visits: int = 2_000  # of a request, and reasons or moments of all its visits together
    body_seconds: int = 20  # to send a request in
    access_log: str = "-"  # a file, - for stderr, empty for none
    audit_log: str = "data/audit.jsonl"  # a file, - for stderr, empty for none
    otel: bool = False  # traces over OTLP, to where OTEL_EXPORTER_OTLP_ENDPOINT says
    log_required: bool = False  # refuse to answer predictions that cannot be logged
    monitor_url: str = ""  # prediction log: a database URL, `off`, or empty for sqlite:///data/predictions.db

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Raises `BadConfig` where a variable is not a number or not yes or no."""
        values = {}
        for field in fields(cls):
            name = PREFIX + field.name.upper()
            if (text := environ.get(name)) is None:
                continue
            if field.type == "bool":
                if text.lower() not in ("", "0", "1", "no", "yes", "false", "true"):
                    raise BadConfig(f"{name} is {text!r}; expected 1 or 0")
                values[field.name] = text.lower() in ("1", "yes", "true")
            elif field.type == "int":
                if not re.fullmatch("0*[1-9][0-9]{0,11}", text):
                    raise BadConfig(f"{name} is {text!r}; expected a whole number from 1")
                values[field.name] = int(text)
            else:
                values[field.name] = text
        return cls(**values)
