"""The date of the newest observation behind each score, by which --rescore finds what is new."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    present = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("sepsis_predictions")}
    if "newest_observation" not in present:
        op.add_column("sepsis_predictions", sa.Column("newest_observation", sa.String(64)))


def downgrade() -> None:
    """Nothing: the tables hold the hospital's data."""
