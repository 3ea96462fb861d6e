"""What a server keeps: who did it, conversations and public ids of replies, jobs, and keys."""

import sqlalchemy as sa
from alembic import op

revision = "3"
down_revision = "2"
branch_labels = None
depends_on = None


def _moment(name: str, *, nullable: bool = False) -> "sa.Column[object]":
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def upgrade() -> None:
    """Add the tables and columns. No table is made anew, so the journal keeps its triggers."""
    op.create_table(
        "jobs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("status", sa.String(9), nullable=False),
        sa.Column("author", sa.String(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("progress", sa.JSON(), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("idempotency_key", sa.String(255), nullable=True),
        sa.Column("cancel_asked", sa.Boolean(), nullable=False),
        sa.Column("starts", sa.Integer(), nullable=False),
        _moment("created_at"),
        _moment("started_at", nullable=True),
        _moment("ended_at", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.UniqueConstraint("author", "idempotency_key", name="uq_jobs_author_idempotency_key"),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'done', 'failed', 'cancelled')", name=op.f("ck_jobs_status")
        ),
    )
    op.create_index("ix_jobs_status", "jobs", ["status"])
    op.create_table(
        "keys",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("role", sa.String(8), nullable=False),
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column("shown", sa.String(16), nullable=False),
        _moment("created_at"),
        _moment("last_used_at", nullable=True),
        _moment("revoked_at", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.CheckConstraint("role IN ('chat', 'editor')", name=op.f("ck_keys_role")),
    )
    op.create_index("ix_keys_name", "keys", ["name"], unique=True)
    op.create_index("ix_keys_secret_hash", "keys", ["secret_hash"], unique=True)
    op.add_column("replies", sa.Column("public_id", sa.String(64), nullable=True))
    op.create_index("ix_replies_public_id", "replies", ["public_id"], unique=True)
    op.add_column("replies", sa.Column("chat", sa.String(64), nullable=True))
    op.create_index("ix_replies_chat", "replies", ["chat"])
    _add_reference("replies", "after_id", "replies")
    for table in ("changes", "feedback"):
        _add_reference(table, "job_id", "jobs")
        op.create_index(f"ix_{table}_job_id", table, ["job_id"])
    for table in ("changes", "events"):
        op.add_column(table, sa.Column("made_by", sa.String(), nullable=False, server_default=sa.text("''")))


def _add_reference(table: str, column: str, to: str) -> None:
    # Inline, because SQLite adds no constraint to a table that is there.
    key = sa.ForeignKey(f"{to}.id", name=f"fk_{table}_{column}_{to}")
    op.add_column(table, sa.Column(column, sa.Integer(), key, nullable=True), inline_references=True)
