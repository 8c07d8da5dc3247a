"""The first tables: predictions and errors."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "predictions",
        sa.Column("id", SERIAL, primary_key=True),
        sa.Column("time", sa.DateTime(), nullable=False, index=True),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("model_version", sa.String(32), nullable=False),
        sa.Column("visit", sa.String(16), nullable=False),
        sa.Column("as_of", sa.DateTime()),
        sa.Column("score", sa.Double()),
        sa.Column("risk_level", sa.String(8), nullable=False),
        sa.Column("bins", sa.Text(), nullable=False),
        sa.Column("codes", sa.Text(), nullable=False),
        sa.Column("unknown", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
    )
    op.create_table(
        "prediction_errors",
        sa.Column("id", SERIAL, primary_key=True),
        sa.Column("time", sa.DateTime(), nullable=False, index=True),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("model_version", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
    )
