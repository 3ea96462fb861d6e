"""Which change overrules which protected answer: the answer is in force again when the change is not on."""

import sqlalchemy as sa
from alembic import op

revision = "4"
down_revision = "3"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table. What was let go of before stays so."""
    op.create_table(
        "releases",
        sa.Column("protected_id", sa.Integer(), nullable=False),
        sa.Column("change_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["protected_id"], ["protected_answers.id"], name="fk_releases_protected_id_protected_answers"
        ),
        sa.ForeignKeyConstraint(["change_id"], ["changes.id"], name="fk_releases_change_id_changes"),
        sa.PrimaryKeyConstraint("protected_id", "change_id", name="pk_releases"),
    )
