"""An append-only file of JSON objects, one per line, that survives a kill at any instant."""

import json
import os
from pathlib import Path

from tinystory.run.folder import Record, cannot_write, read_records


class Journal:
    """The records of `path`, which is created with its folder. Each line reaches the disk before `append` returns. An
    incomplete last line was being written when a process died, and is dropped. Raises UserError if the file cannot be
    written, or holds something else."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.records: list[Record] = list(read_records(self.path))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115  (open for as long as the process lives)
            self._file.seek(0)
            self._file.truncate(self._file.read().rfind(b"\n") + 1)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def append(self, record: Record) -> None:
        line = (json.dumps(record) + "\n").encode()
        whole = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                self._file.truncate(whole)
                raise OSError(None, "the disk is full")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.records.append(record)

    def close(self) -> None:
        self._file.close()
