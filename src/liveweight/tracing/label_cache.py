"""Neuron labels on disk.

Owns one SQLite file a model, `<cache_dir>/neuron_labels/<model hash>-<format>.sqlite`: a label's bytes by (layer,
neuron). SQLite's own locks make two processes safe, and its journal keeps a killed one from leaving half a label. The
file holds only what can be computed again: one that cannot be read is thrown away. Knows nothing of what a label says.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from liveweight.errors import InvalidInput, LiveweightError, NoSpace

FORMAT = 2  # raised when a label would come out otherwise than before
_BATCH = 400  # pairs of one question; SQLite allows 999 variables
_PATIENCE = 30.0  # seconds for another process to finish its write
_TABLE = (
    "CREATE TABLE IF NOT EXISTS labels (layer INTEGER, neuron INTEGER, label BLOB NOT NULL,"
    " PRIMARY KEY (layer, neuron)) WITHOUT ROWID"
)
_T = TypeVar("_T")


class LabelCache:
    """The labels of one model that were computed before."""

    def __init__(self, cache_dir: Path, model_hash: str, *, fast: bool = False) -> None:
        """Nothing is opened or made before the first use. `fast` labels have a file of their own."""
        self.path = cache_dir / "neuron_labels" / f"{model_hash}-{FORMAT}{'-fast' if fast else ''}.sqlite"

    def get(self, neurons: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """The kept labels among `neurons`, by (layer, neuron). Raises as `put` does."""

        def select(connection: sqlite3.Connection) -> dict[tuple[int, int], bytes]:
            found: dict[tuple[int, int], bytes] = {}
            for start in range(0, len(neurons), _BATCH):
                batch = neurons[start : start + _BATCH]
                marks = ",".join("(?, ?)" for _ in batch)
                rows = connection.execute(
                    f"SELECT layer, neuron, label FROM labels WHERE (layer, neuron) IN (VALUES {marks})",
                    [number for pair in batch for number in pair],
                )
                found |= {(layer, neuron): label for layer, neuron, label in rows}
            return found

        return self._with(select) if neurons and self.path.exists() else {}

    def put(self, labels: Mapping[tuple[int, int], bytes]) -> None:
        """Keep labels, all of them or none. Raises NoSpace, and LiveweightError where the folder cannot be written."""

        def insert(connection: sqlite3.Connection) -> None:
            rows = [(*pair, label) for pair, label in labels.items()]
            connection.executemany("INSERT OR REPLACE INTO labels VALUES (?, ?, ?)", rows)

        self._with(insert)

    def counts(self) -> dict[int, int]:
        """How many neurons of each layer are kept. Raises as `put` does."""

        def count(connection: sqlite3.Connection) -> dict[int, int]:
            return dict(connection.execute("SELECT layer, COUNT(*) FROM labels GROUP BY layer").fetchall())

        return self._with(count) if self.path.exists() else {}

    def absorb(self, file: Path) -> int:
        """Take over what another machine's file of the same model holds; how many labels were new.

        Raises InvalidInput for a file that cannot be read, and as `put` does.
        """
        if not file.is_file():
            raise InvalidInput(f"There is no file {file}.", hint="Give the file that the other machine wrote.")

        def take(connection: sqlite3.Connection) -> int:
            before = connection.total_changes
            for batch in _labels_of(file):
                connection.executemany("INSERT OR IGNORE INTO labels VALUES (?, ?, ?)", batch)
            return connection.total_changes - before

        return self._with(take)

    def _with(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do something in one transaction; in a new file where the present one is damaged."""
        try:
            return self._once(work)
        except sqlite3.OperationalError as error:  # locked, full or not writable: nothing is wrong with the content
            raise cannot_keep(self.path, error) from error
        except sqlite3.DatabaseError:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_keep(self.path, error) from error
        try:
            return self._once(work)
        except (OSError, sqlite3.Error) as error:
            raise cannot_keep(self.path, error) from error

    def _once(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=_PATIENCE)) as connection, connection:
            connection.execute(_TABLE)
            return work(connection)


def _labels_of(file: Path) -> Iterator[list[tuple[int, int, bytes]]]:
    """The rows of another machine's file, some at a time. Raises InvalidInput where they cannot be read to the end."""
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as other:
            rows = other.execute("SELECT layer, neuron, label FROM labels")
            while batch := rows.fetchmany(_BATCH):
                yield batch
    except sqlite3.Error as error:
        raise InvalidInput(f"{file} cannot be read as labels: {error}.", hint="Copy it again.") from error


def cannot_keep(path: Path, error: Exception) -> LiveweightError:
    """The error for a cache file that cannot be read or written: NoSpace where the disk is full."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "is full" in str(error)
    kind = NoSpace if full else LiveweightError
    return kind(
        f"What was measured cannot be kept in {path}: {error}.",
        hint="Free some space, or point LIVEWEIGHT_CACHE_DIR at a folder that can be written.",
    )
