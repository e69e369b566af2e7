"""An append-only file of JSON objects, one per line, that survives a kill at any instant."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinystory.run.errors import UserError, cannot_write

TAIL = 1 << 26  # bytes at the end of a file to search; every record is shorter
RECORD_START = b'{"'


class Journal:
    """Appends records to `path` and creates the folder; `run.records.read_records` reads the
        records. Raises UserError if the file cannot be written.

    `append` hands records to the operating system, so killing the process loses none. A power cut
    loses records that are not yet on the disk; after `close`, or if `durable`, all records are on
    the disk. An incomplete last record, left by a killed process, is cut off, and so are zeros,
    left by a power cut. A file that ends in anything else is refused. A symbolic link is refused,
    because it could lead to another file."""

    def __init__(self, path: Path, durable: bool = False):
        self.path = path
        self.durable = durable
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_symlink():
                raise UserError(
                    f"{self.path} is a symbolic link, and records are not written through links: put "
                    "the file itself there, or choose another"
                )
            self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115
            self._mend_last_line()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _mend_last_line(self) -> None:
        """Complete or cut off a last line that a killed process left incomplete."""
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(size - TAIL, 0))
        tail = self._file.read(min(size, TAIL))
        line = tail[tail.rfind(b"\n") + 1 :]
        if not line:
            return
        if _is_record(line):
            self._file.write(b"\n")
            return
        begun = line.rstrip(b"\0")  # a power cut leaves zeros
        if begun.startswith(RECORD_START[: len(begun)]) and len(line) < TAIL:
            self._file.truncate(size - len(line))
        else:
            self._file.close()
            raise UserError(
                f"{self.path} ends in a line that is not a record, so this is some other file: choose "
                "another name, or move the file away"
            )

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write all the records or none."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        lines = text.encode()
        size = self._file.seek(0, os.SEEK_END)
        if not self._is_in_place():
            raise UserError(
                f"{self.path} was moved or deleted while it was written to: resume in its new place, "
                "or start again"
            )
        try:
            while lines:  # an unbuffered write may be partial, as on a nearly full disk
                written = self._file.write(lines)
                lines = lines[written:]
            if self.durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # a device has no size
                self._file.truncate(size)
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        if self._file.closed:
            return
        with contextlib.suppress(OSError):  # a device has nothing to write back
            os.fsync(self._file.fileno())
        self._file.close()


def _is_record(line: bytes) -> bool:
    """Whether the line is a complete JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
