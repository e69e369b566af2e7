"""An append-only file of JSON objects, one per line, that survives a kill at any instant."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinystory.run.errors import UserError, cannot_write

TAIL = 1 << 26  # bytes, more than any record has


class Journal:
    """Appends records to `path`, which is created with its folder; `run.folder.read_records` reads them.

    Records are handed to the operating system before `append` returns, so killing the process loses none of them. A
    power cut loses those that the system has not written back yet: none after `close`, or if `durable`. An incomplete
    last line was being written when a process died, and is cut off. Raises UserError if the file cannot be written."""

    def __init__(self, path: Path, durable: bool = False):
        self.path, self.durable = Path(path), durable
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115  (closed by `close`)
            size = self._file.seek(0, os.SEEK_END)
            self._file.seek(max(size - TAIL, 0))
            tail = self._file.read(min(size, TAIL))
            if tail and not tail.endswith(b"\n"):
                self._file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write all the records or none."""
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        size = self._file.seek(0, os.SEEK_END)
        if not os.fstat(self._file.fileno()).st_nlink:
            raise UserError(f"{self.path} was deleted while it was written to, and its records with it: start again")
        try:
            while lines:  # an unbuffered write may be partial, as on a nearly full disk
                lines = lines[self._file.write(lines) :]
            if self.durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # of a device, which has no size
                self._file.truncate(size)
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a device, which has nothing to write back
            os.fsync(self._file.fileno())
        self._file.close()
