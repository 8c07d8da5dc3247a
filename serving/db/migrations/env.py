"""Alembic's entry: ``db_predictor.py --init-db`` hands over its connection; the ``alembic`` command takes the URL from
the environment (SEPSIS_DB_URL) or the default of ``db_predictor.py``."""

import os

from alembic import context

from serving.db.connection import DEFAULT_URL, URL_VARIABLE, connect
from serving.db.tables import schema

# the tables of the project only: a hospital's others are none of its business
OWN = set(schema().tables)


def ours(name, kind, parents) -> bool:
    return kind != "table" or name in OWN


def migrate(connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=schema(),
        include_name=ours,
        version_table="sepsis_schema_version",
        render_as_batch=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    engine = connect(os.environ.get(URL_VARIABLE) or DEFAULT_URL)
    with engine.begin() as connection:
        migrate(connection)
