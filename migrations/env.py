"""Runs the migrations on the connection that `orchestrator.db.database` hands over.

The connection is in a write transaction already (and, on PostgreSQL, holds the advisory lock), so
that two processes migrating at once wait for each other. Knows nothing of URLs.
"""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
