"""The tables."""

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None
branch_labels = None
depends_on = None


def _moment(name: str, *, nullable: bool = False) -> "sa.Column[object]":
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "models",
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("architecture", sa.String(), nullable=False),
        _moment("created_at"),
        sa.PrimaryKeyConstraint("hash", name="pk_models"),
    )
    op.create_table(
        "replies",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_hash", sa.String(64), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("text", sa.JSON(), nullable=False),
        sa.Column("token_ids", sa.JSON(), nullable=False),
        sa.Column("prompt_token_ids", sa.JSON(), nullable=False),
        sa.Column("version_number", sa.Integer(), nullable=False),
        sa.Column("version_hash", sa.String(64), nullable=False),
        sa.Column("sampling", sa.JSON(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        _moment("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_replies"),
        sa.ForeignKeyConstraint(["model_hash"], ["models.hash"], name="fk_replies_model_hash_models"),
    )
    op.create_index("ix_replies_model_hash", "replies", ["model_hash"])
    op.create_table(
        "feedback",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("reply_id", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.String(8), nullable=False),
        sa.Column("wanted", sa.JSON(), nullable=True),
        sa.Column("reason", sa.JSON(), nullable=True),
        _moment("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_feedback"),
        sa.ForeignKeyConstraint(["reply_id"], ["replies.id"], name="fk_feedback_reply_id_replies"),
        sa.CheckConstraint("verdict IN ('good', 'bad', 'fix')", name=op.f("ck_feedback_verdict")),
    )
    op.create_index("ix_feedback_reply_id", "feedback", ["reply_id"])
    _create_changes()
    op.create_table(
        "reports",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("change_id", sa.Integer(), nullable=False),
        sa.Column("report", sa.JSON(), nullable=False),
        _moment("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_reports"),
        sa.ForeignKeyConstraint(["change_id"], ["changes.id"], name="fk_reports_change_id_changes"),
    )
    op.create_index("ix_reports_change_id", "reports", ["change_id"])
    op.create_table(
        "protected_answers",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_hash", sa.String(64), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.Column("token_ids", sa.JSON(), nullable=False),
        sa.Column("feedback_id", sa.Integer(), nullable=True),
        sa.Column("change_id", sa.Integer(), nullable=True),
        sa.Column("active", sa.Boolean(), nullable=False),
        _moment("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_protected_answers"),
        sa.ForeignKeyConstraint(["model_hash"], ["models.hash"], name="fk_protected_answers_model_hash_models"),
        sa.ForeignKeyConstraint(["feedback_id"], ["feedback.id"], name="fk_protected_answers_feedback_id_feedback"),
        sa.ForeignKeyConstraint(["change_id"], ["changes.id"], name="fk_protected_answers_change_id_changes"),
    )
    op.create_index("ix_protected_answers_model_hash", "protected_answers", ["model_hash"])
    op.create_table(
        "intents",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_hash", sa.String(64), nullable=False),
        sa.Column("change_id", sa.Integer(), nullable=True),
        sa.Column("moves", sa.JSON(), nullable=False),
        sa.Column("status", sa.String(10), nullable=False),
        sa.Column("reason", sa.JSON(), nullable=False),
        _moment("created_at"),
        _moment("closed_at", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_intents"),
        sa.ForeignKeyConstraint(["model_hash"], ["models.hash"], name="fk_intents_model_hash_models"),
        sa.ForeignKeyConstraint(["change_id"], ["changes.id"], name="fk_intents_change_id_changes"),
        sa.CheckConstraint("status IN ('open', 'finished', 'abandoned')", name=op.f("ck_intents_status")),
    )
    opened = sa.text("status = 'open'")
    op.create_index(
        "ix_intents_one_open", "intents", ["model_hash"], unique=True, sqlite_where=opened, postgresql_where=opened
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("subject", sa.String(32), nullable=False),
        sa.Column("model_hash", sa.String(64), nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        _moment("created_at"),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
    )
    op.create_index("ix_events_subject", "events", ["subject"])


def _create_changes() -> None:
    states = "state IN ('intended', 'active', 'off', 'undone', 'refused', 'failed')"
    op.create_table(
        "changes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model_hash", sa.String(64), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(8), nullable=False),
        sa.Column("strength", sa.Float(53), nullable=False),
        sa.Column("name", sa.JSON(), nullable=False),
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("adjustment_hash", sa.String(64), nullable=False),
        sa.Column("adjustment", sa.JSON(), nullable=False),
        sa.Column("blob_hash", sa.String(64), nullable=True),
        sa.Column("feedback_id", sa.Integer(), nullable=True),
        sa.Column("question", sa.JSON(), nullable=False),
        sa.Column("wanted", sa.JSON(), nullable=True),
        sa.Column("prompt_hash", sa.String(64), nullable=False),
        sa.Column("key_layer", sa.Integer(), nullable=True),
        sa.Column("key_vector", sa.LargeBinary(), nullable=True),
        sa.Column("forced", sa.Boolean(), nullable=False),
        sa.Column("replaced_by", sa.Integer(), nullable=True),
        sa.Column("reason", sa.JSON(), nullable=False),
        _moment("created_at"),
        _moment("updated_at"),
        sa.PrimaryKeyConstraint("id", name="pk_changes"),
        sa.ForeignKeyConstraint(["model_hash"], ["models.hash"], name="fk_changes_model_hash_models"),
        sa.ForeignKeyConstraint(["feedback_id"], ["feedback.id"], name="fk_changes_feedback_id_feedback"),
        sa.ForeignKeyConstraint(["replaced_by"], ["changes.id"], name="fk_changes_replaced_by_changes"),
        sa.UniqueConstraint("model_hash", "position", name="uq_changes_model_hash_position"),
        sa.CheckConstraint(states, name=op.f("ck_changes_state")),
    )
    for column in ("state", "blob_hash", "prompt_hash"):
        op.create_index(f"ix_changes_{column}", "changes", [column])
