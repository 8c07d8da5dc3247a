"""How many predictions a row counts: of a stream, one row an hour stands for those of a visit at one level."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("predictions", sa.Column("n", sa.Integer(), nullable=False, server_default="1"))
