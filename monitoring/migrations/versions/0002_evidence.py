"""Why a prediction has no score, how old its evidence was, and with which site map of codes it was made."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("predictions", sa.Column("reason", sa.String(32)))
    op.add_column("predictions", sa.Column("newest", sa.DateTime()))
    op.add_column("predictions", sa.Column("codes_sha256", sa.String(64)))
