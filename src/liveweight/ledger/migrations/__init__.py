"""The database's steps from empty to now. Steps are only ever added: a written one is never edited."""
