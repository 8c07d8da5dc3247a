"""Alembic's entry: `monitoring.log.open_engine` passes its connection."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], version_table="prediction_log_version")
with context.begin_transaction():
    context.run_migrations()
