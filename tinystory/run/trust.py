"""Which run folders are this user's own, and what another one would do.

A run's config.json carries a mark: an HMAC-SHA-256 of all that it says, with a secret that only
this user's programs read. Nobody else can make one, nor change what a marked file says. Whatever
acts on what a folder says asks for --trust where the mark is missing or wrong. The mark covers
neither the folder's path, so it may be moved, nor the records and checkpoints beside config.json,
whose readers check them."""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tinystory.run.errors import UserError
from tinystory.run.text import printable

MARK = "mark"  # key in config.json
SECRET_BYTES = 32
TRUST_HELP = "act on a run's folder that is not your own (once: it gets your mark), or on --init's"


def secret_path() -> Path:
    """XDG_CONFIG_HOME/tinystory/secret, else ~/.config/tinystory/secret. Raises UserError without a
    home."""
    folder = os.environ.get("XDG_CONFIG_HOME")
    try:
        config_home = Path(folder) if folder else Path.home() / ".config"
    except RuntimeError:
        raise UserError("there is no home folder for the secret that marks it") from None
    return config_home / "tinystory" / "secret"


def user_secret() -> bytes:
    """This user's secret, made if there is none yet. Raises UserError if it can neither be read nor
    made."""
    path = secret_path()
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=path.parent) as file:  # only this user may read it
                file.write(secrets.token_bytes(SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
                with contextlib.suppress(FileExistsError):  # of a process that was faster
                    os.link(file.name, path)
        secret = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read or make {path}: {error.strerror}") from error
    if len(secret) != SECRET_BYTES:
        raise UserError(f"{path} is damaged: delete it")
    return secret


def mark_of(record: Mapping[str, Any], secret: bytes) -> str:
    """The mark of what a config.json says, in hexadecimal."""
    said = {name: value for name, value in record.items() if name != MARK}
    text = json.dumps(said, sort_keys=True)
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def marked(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with this user's mark. Without one, after a warning, if there can be no secret, as
    in a container whose home is read-only: the run goes on all the same."""
    try:
        return {**record, MARK: mark_of(record, user_secret())}
    except UserError as error:
        print(
            f"warning: this run's folder does not get your mark ({error}), so --resume will want "
            "--trust; set XDG_CONFIG_HOME to a folder that is kept"
        )
        return dict(record)


def is_own(record: Mapping[str, Any]) -> bool:
    """Whether a config.json carries this user's mark."""
    mark = str(record.get(MARK))
    try:
        own_mark = mark_of(record, user_secret())
    except UserError:
        return False
    return hmac.compare_digest(mark.encode(errors="replace"), own_mark.encode())


def require_own(config_path: Path, record: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raises UserError unless the record, read from config.json, carries this user's mark.

    options: those of a run that would follow it; the sentence says what they do outside the
    folder."""
    if is_own(record):
        return
    acts = ", and ".join(outside_acts(options)) or "do nothing outside its folder"
    raise UserError(
        f"{config_path} does not carry your mark: somebody else made it, or you did on another "
        "machine or with an earlier version, or it was changed since; it would "
        f"{acts}; if you trust it, add --trust, once"
    )


def outside_acts(options: Mapping[str, Any]) -> Iterator[str]:
    """Yields what a run with these options does outside its folder, as in "ask URL": code that it
    runs, servers that it asks, and files that it reads."""
    reward = options.get("reward", "")
    if ".py" in reward:
        yield f"run the code of {_quoted(reward)}"
    if urls := options.get("teacher_url"):
        act = f"send stories to {', '.join(map(_quoted, urls))}"
        if extra := options.get("teacher_extra"):
            act += f" with the fields {_quoted(extra)}"
        # openai sends the key, headers, organisation and project that it finds here
        variables = [name for name in sorted(os.environ) if name.startswith("OPENAI_")]
        if variables:
            act += f" with your {', '.join(variables)}"
        yield f"{act} for replies of up to {options['teacher_max_tokens']} tokens"
    files = dict.fromkeys(_files(options))  # each once
    if files:
        yield f"read {', '.join(map(_quoted, files))}"


def _files(options: Mapping[str, Any]) -> Iterator[str]:
    """Files and models outside its folder that a run with these options reads."""
    for name in ("init", "teacher_prompt"):
        if options.get(name):
            yield options[name]
    if os.path.exists(options.get("openings", "")):  # else it is the text of an opening
        yield options["openings"]
    for name in ("corpus", "student_corpus"):
        yield from filter(names_file, options.get(name, ()))


def names_file(corpus: str) -> bool:
    """Whether a corpus is a file: these have a suffix, and the names of corpora have none."""
    return bool(Path(corpus).suffix)


def student_corpus(record: Mapping[str, Any]) -> list[str]:
    """The corpus of a run's student that its config.json records; [] if none is."""
    match record:
        case {"options": {"student": {"corpus": [*names]}}}:
            return [name for name in names if isinstance(name, str)]
        case _:
            return []


def _quoted(text: str) -> str:
    return shlex.quote(" ".join(printable(text).split()))
