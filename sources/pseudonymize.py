"""Prepares files of observations and labels for other people: hashes for client and visit, dates shifted by client.

The key is in the environment variable SEPSIS_PSEUDONYM_KEY. Files that were made with one key can be joined. Features,
labels, scores, and rows that are set aside stay those of the originals. Values stay, too: a rare value may still
identify a patient.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common.artifacts import write_tables
from common.command_line import DONE, add_command, log, table_path
from common.pseudonyms import lasting_pseudonyms, pseudonymized
from feature_pipeline import BadConfig, read_table


def work(arguments: argparse.Namespace) -> int:
    names, out = lasting_pseudonyms(), Path(arguments.out_dir)
    paths = arguments.files
    if len({path.name for path in paths}) < len(paths):
        raise BadConfig("two of the files have the same name; one would overwrite the other")
    for path in paths:
        if (out / path.name).exists() and (out / path.name).samefile(path):
            raise BadConfig(f"{str(path)!r} would be overwritten; choose another --out-dir")
    for path in paths:
        frame, malformed = read_table(path)
        if malformed:
            log.warning("%s: %d lines with too many fields are left out", path, malformed)
        table = pseudonymized(frame, names)
        write_tables({out / path.name: table})
        dropped = [column for column in frame.columns if column not in table.columns]
        log.info("%s: %d rows%s", out / path.name, len(table), f"; left out: {', '.join(dropped)}" if dropped else "")
    return DONE


def add_to(commands: Any) -> None:
    """The command ``prepare_data.py pseudonymize``."""
    example = "python prepare_data.py pseudonymize observations.csv labels.csv --out-dir shared"
    command = add_command(commands, "pseudonymize", __doc__, example, work)
    command.add_argument(
        "files", nargs="+", type=table_path, metavar="FILE", help="observations or labels; .csv, .csv.gz or .parquet"
    )
    command.add_argument("--out-dir", required=True, metavar="DIR", help="where the results go, under the same names")
