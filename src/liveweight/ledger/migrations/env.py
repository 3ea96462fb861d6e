"""What alembic runs: the steps of `versions`, on the connection that the ledger hands over."""

from alembic import context

from liveweight.ledger.tables import Base

# Named apart, so that a ledger can share a database with another program that uses alembic.
context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, version_table="ledger_revision"
)
with context.begin_transaction():
    context.run_migrations()
