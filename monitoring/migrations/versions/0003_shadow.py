"""Which scores a challenger gave that was shown to nobody."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("predictions", sa.Column("shadow", sa.Boolean(), nullable=False, server_default=sa.false()))
