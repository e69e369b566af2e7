"""Writes files completely or not at all, and reads foreign files with checks."""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tinystory.run.errors import UserError, cannot_write

LONGEST = 1 << 26  # maximum bytes of a file of text or JSON, or of a line of records


# ---- writing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Yields a binary file that durably replaces `path` when the block ends without an error. After
    an error `path` is unchanged. Raises UserError if the file cannot be written (disk full,
    read-only, no such folder)."""
    with new_file(path) as partial:
        with open(partial, "r+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)  # until then the rename is not durable


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields the path of a new, empty file beside `path`, which the block fills and moves to
    `path`; if it is not moved, it is removed. The name is random and the file is new, so nobody can
    have put a link to another file in its place. In the block, OSError becomes a UserError."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        # 0o666 minus the umask, as for any new file; mkstemp would give others no permissions
        descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        os.close(descriptor)
        yield partial
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        # a read-only file system refuses even to remove a missing file
        with contextlib.suppress(OSError):
            partial.unlink()


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write content (str as UTF-8) to a file. A kill at any instant leaves either the old content
    or the new."""
    if isinstance(content, str):
        content = content.encode()
    with atomic_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary path at which the block makes a folder. When the block ends without an
    error, the folder is renamed to `folder`, which must not exist. Half-written folders of killed
    processes are removed first. Raises UserError if the folder cannot be written."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        partial.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(path: Path) -> None:
    """Create the folder of a file that is written later, after long work. Raises UserError if the
    file cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # a new file would replace the device or pipe
            raise OSError(errno.EINVAL, "it is not a regular file")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise cannot_write(path, error) from error


# ---- reading -------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file opened for reading. In the block, OSError and ValueError become a UserError
    without advice, which callers may add. A pipe or a device is refused, because reading could
    block."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            yield file
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}") from error


def read_text(path: Path) -> str:
    """The text of a regular file, without a byte order mark. Raises UserError if the file has more
    than LONGEST bytes or NUL characters, or is not UTF-8."""
    with open_bytes(path) as file:
        content = file.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise ValueError(f"it is over {LONGEST >> 20} MB")
        if b"\0" in content:
            raise ValueError("it holds NUL characters")
        return content.decode("utf-8-sig")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises UserError if the file cannot be read."""
    digest = hashlib.sha256()
    with open_bytes(path) as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()
