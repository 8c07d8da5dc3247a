"""The CDS Hooks cards that were given, and how clinicians answered them."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "cards",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
        sa.Column("time", sa.DateTime(), nullable=False, index=True),
        sa.Column("model_version", sa.String(32), nullable=False),
        sa.Column("card", sa.String(36), nullable=False, unique=True),
        sa.Column("visit", sa.String(16), nullable=False),
        sa.Column("risk_level", sa.String(8), nullable=False),
        sa.Column("outcome", sa.String(16)),
        sa.Column("reason", sa.String(32)),
        sa.Column("answered", sa.DateTime()),
    )
