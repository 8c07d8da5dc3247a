"""The first tables. One that is there already, made by the hospital, is left as it is."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

from serving.db.tables import Key, like, pending_index

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

WHEN = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
LEVELS = "risk_level IN ('LOW', 'MEDIUM', 'HIGH', 'UNKNOWN')"


def upgrade() -> None:
    database = sa.inspect(op.get_bind())
    present = set(database.get_table_names())
    types = {"client": Key(), "visit_id": Key()}
    if "visits" in present:  # keys of the hospital's own types
        dialect = op.get_bind().dialect.name
        types |= {column["name"]: like(column["type"], dialect) for column in database.get_columns("visits")}
    if "patient_observations" not in present:
        op.create_table(
            "patient_observations",
            sa.Column("id", SERIAL, autoincrement=True, nullable=False),
            sa.Column("visit_id", types["visit_id"], nullable=False),
            sa.Column("client", types["client"], nullable=False),
            sa.Column("observation_date", WHEN, nullable=False),
            sa.Column("observation_type_code", sa.String(64), nullable=False),
            sa.Column("observation_value", sa.Double()),
            sa.Column("reference_range_min", sa.Double()),
            sa.Column("reference_range_max", sa.Double()),
            sa.Column("unit", sa.String(64)),
            sa.PrimaryKeyConstraint("id", name="pk_patient_observations"),
        )
        op.create_index("ix_patient_observations_visit", "patient_observations", ["client", "visit_id"])
    if "visits" not in present:
        op.create_table(
            "visits",
            sa.Column("client", Key(), nullable=False),
            sa.Column("visit_id", Key(), nullable=False),
            sa.Column("sepsis_score", sa.Double()),
            sa.Column("risk_level", sa.String(16)),
            sa.Column("scored_at", WHEN),
            sa.PrimaryKeyConstraint("client", "visit_id", name="pk_visits"),
            sa.CheckConstraint("sepsis_score BETWEEN 0 AND 1", name="ck_visits_score"),
            sa.CheckConstraint(LEVELS, name="ck_visits_level"),
        )
        columns, options = pending_index("client", "visit_id", "sepsis_score", op.get_bind().dialect.name)
        op.create_index("ix_visits_pending", "visits", columns, **options)
    if "sepsis_predictions" not in present:
        op.create_table(
            "sepsis_predictions",
            sa.Column("id", SERIAL, autoincrement=True, nullable=False),
            sa.Column("visit_id", types["visit_id"], nullable=False),
            sa.Column("client", types["client"], nullable=False),
            sa.Column("sepsis_score", sa.Double()),
            sa.Column("risk_level", sa.String(16), nullable=False),
            sa.Column("model_version", sa.String(64), nullable=False),
            sa.Column("scored_at", WHEN, nullable=False),
            sa.Column("observations", sa.Integer(), nullable=False),
            sa.Column("newest_observation", sa.String(64)),
            sa.Column("reason", sa.String(32)),
            sa.Column("as_of", WHEN),
            sa.Column("hours_since_newest", sa.Double()),
            sa.PrimaryKeyConstraint("id", name="pk_sepsis_predictions"),
            # a visits table that is the hospital's own may have another key
            *(
                [
                    sa.ForeignKeyConstraint(
                        ["client", "visit_id"],
                        ["visits.client", "visits.visit_id"],
                        name="fk_sepsis_predictions_visit",
                    )
                ]
                if "visits" not in present
                else []
            ),
            sa.UniqueConstraint(
                "client", "visit_id", "model_version", "observations", name="uq_sepsis_predictions_score"
            ),
            sa.CheckConstraint("sepsis_score BETWEEN 0 AND 1", name="ck_sepsis_predictions_score"),
            sa.CheckConstraint(LEVELS, name="ck_sepsis_predictions_level"),
            sa.CheckConstraint("observations > 0", name="ck_sepsis_predictions_observations"),
        )


def downgrade() -> None:
    """Nothing: the tables hold the hospital's data."""
