"""Brings a hospital's data into the project's two tables, observations and labels.

One command for each source. ``demo`` writes a synthetic cohort, ``pseudonymize`` prepares tables for other people.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common.command_line import make_parser, run_command
from sources import demo_cohort, fhir_ndjson, inspect, meds, mimic_iv, omop, physionet2019, pseudonymize, table


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, "python prepare_data.py demo --observations new.parquet --labels new_labels.csv")
    commands = parser.add_subparsers(dest="command", required=True)
    for source in (omop, meds, fhir_ndjson, mimic_iv, table, inspect, physionet2019, demo_cohort, pseudonymize):
        source.add_to(commands)
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
