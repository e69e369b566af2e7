"""An append-only file of JSON objects, one per line, that survives a kill at any instant."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinystory.run.errors import UserError, cannot_write

TAIL = 1 << 26  # bytes; every record is shorter


class Journal:
    """Appends records to `path`, creating its folder; `run.folder.read_records` reads them. Raises
    UserError if it cannot.

    `append` hands records to the operating system, so killing the process loses none. A power cut
    loses those not yet written back: none after `close`, or if `durable`. An incomplete last line,
    left by a killed process, is cut off."""

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
            raise UserError(
                f"{self.path} was deleted while it was written to, and its records with it: start again"
            )
        try:
            while lines:  # an unbuffered write may be partial, as on a nearly full disk
                lines = lines[self._file.write(lines) :]
            if self.durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # a device has no size
                self._file.truncate(size)
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a device has nothing to write back
            os.fsync(self._file.fileno())
        self._file.close()
