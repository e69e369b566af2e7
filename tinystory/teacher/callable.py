"""A user's Python function as the teacher, in a subprocess, so that no failure of it costs the run
its results. It is `f(opening, stories)`, or `f(openings, stories)` for all stories of a step at
once, and returns one score per story: 0..1, or None, with which a story gets no reward and no
gradient and is counted as unscored."""

import contextlib
import hashlib
import inspect
import multiprocessing
import os
import reprlib
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tinystory.run.errors import UserError
from tinystory.run.paths import ROOT
from tinystory.teacher.grade import LocalGrader
from tinystory.teacher.prompt import Question

# openings and stories of a step
ScoreStories = Callable[[Sequence[str], Sequence[str]], Sequence[float | None]]
FUNCTION = "score"  # default of FILE.py without :FUNCTION


class CallableGrader(LocalGrader):
    def __init__(self, function: ScoreStories, name: str):
        super().__init__({"scored_by": name})
        self.function = function

    def scores(self, questions: Sequence[Question]) -> Sequence[float | None]:
        openings = [question.opening for question in questions]
        stories = [question.story for question in questions]
        return self.function(openings, stories)


def random_scores(openings: Sequence[str], stories: Sequence[str]) -> list[float]:
    """`--reward random`, the control that separates drift from learning: per story, three scores
    0..3, summed and divided by 9 as a teacher's are, but drawn from the story's hash."""
    scores: list[float] = []
    for story in stories:
        digest = hashlib.blake2b(story.encode("utf-8", "replace"), digest_size=3).digest()
        scores.append(sum(byte % 4 for byte in digest) / 9)
    return scores


CONTROLS: dict[str, ScoreStories] = {
    "random": random_scores,
    # only the other terms of the reward are learned
    "constant": lambda openings, stories: [0.5] * len(stories),
}


@contextlib.contextmanager
def load_score(spec: str, timeout_s: float = 300.0) -> Iterator[ScoreStories]:
    """Yield the control named `spec`, or the function FILE.py:FUNCTION (default: `score`), which
    runs in a subprocess until the block ends. Raises UserError, here or from a call, if there is no
    such function, if it fails, exits or takes longer than `timeout_s`, or if it does not return one
    number in 0..1 or None per story."""
    if spec in CONTROLS:
        yield CONTROLS[spec]
        return
    file, _, name = spec.rpartition(":")
    if spec.endswith(".py"):
        file = spec
        name = FUNCTION
    if not (file.endswith(".py") and Path(file).is_file()):
        raise UserError(
            f"--reward {spec}: there is no Python file {file!r}; write it as FILE.py or FILE.py:FUNCTION"
        )
    ours, theirs = multiprocessing.Pipe()
    command = [sys.executable, "-u", "-m", __name__, file, name, str(theirs.fileno())]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    with theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
    with process, ours:
        function = RemoteFunction(f"--reward {spec}", file, process, ours, timeout_s)
        try:
            first_parameter = function.answer()
            yield function.ask if first_parameter == "openings" else function.by_opening
        finally:
            process.kill()


@dataclass
class RemoteFunction:
    """The user's function in its subprocess."""

    option: str  # as the user gave it
    file: str
    process: subprocess.Popen
    connection: Connection
    timeout_s: float

    def ask(self, opening: str | Sequence[str], stories: Sequence[str]) -> Any:
        """Its scores. Raises UserError for an error of the user's."""
        with contextlib.suppress(ConnectionError):  # it exited before it read the question
            self.connection.send((opening, stories))
        return self.answer()

    def answer(self) -> Any:
        """What it sends next. Raises UserError as `ask` does."""
        try:
            if not self.connection.poll(self.timeout_s):
                limit = f"{self.timeout_s:g} s (--teacher-timeout)"
                raise UserError(f"{self.option}: {self.file}: it took more than {limit}")
            error, answer = self.connection.recv()
        except (EOFError, ConnectionError):
            # it may have closed only the connection
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            code = self.process.returncode
            raise UserError(
                f"{self.option}: {self.file}: it ended its process (exit code {code})"
            ) from None
        if error:
            raise UserError(f"{self.option}: {error}")
        return answer

    def by_opening(self, openings: Sequence[str], stories: Sequence[str]) -> list[float | None]:
        """Scores from one call per opening."""
        scores: list[float | None] = [None] * len(stories)
        for opening in dict.fromkeys(openings):
            rows = [row for row, other in enumerate(openings) if other == opening]
            of_opening = self.ask(opening, [stories[row] for row in rows])
            for row, score in zip(rows, of_opening, strict=True):
                scores[row] = score
        return scores


# ---- in the subprocess ---------------------------------------------------------------------------


class _Refused(Exception):
    """The message says what is wrong with the function or its return value."""


def main() -> None:
    file, name, descriptor = sys.argv[1:]
    sys.argv = [file]
    # the trainer needs its scores to end the step
    for ended in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ended, signal.SIG_IGN)
    with Connection(int(descriptor)) as connection:
        try:
            _serve(file, name, connection)
        except BaseException as error:  # the user's code can raise anything, an exit included
            message = str(error) if isinstance(error, _Refused) else _cause(error, file)
            with contextlib.suppress(ConnectionError):  # the trainer has ended
                connection.send((message, None))


def _serve(file: str, name: str, connection: Connection) -> None:
    """Send the name of the function's first parameter, then the scores for each (opening(s),
    stories)."""
    sys.path.insert(0, str(Path(file).resolve().parent))  # as `python FILE.py` has it
    names = runpy.run_path(file, run_name=Path(file).stem)
    function = names.get(name)
    if not callable(function):
        own = [each for each, value in names.items() if inspect.isfunction(value)]
        hint = f"; it has {', '.join(own[:8])}: write {file}:{own[0]}" if own else ""
        raise _Refused(f"{file} has no function {name!r}{hint}")
    parameters: list[str] = []
    with contextlib.suppress(TypeError, ValueError):  # a callable without a signature
        parameters = list(inspect.signature(function).parameters)
    connection.send(("", parameters[0] if parameters else ""))
    while True:
        opening, stories = connection.recv()
        connection.send(("", _checked(function(opening, stories), len(stories))))


def _checked(scores: Any, count: int) -> list[float | None]:
    """The scores of `count` stories. Raises _Refused if they are none."""
    is_list = scores is not None and not isinstance(scores, str)
    values = list(scores) if is_list else []
    if len(values) != count:
        given = f"{len(values)} scores for {count} stories" if is_list else reprlib.repr(scores)
        raise _Refused(f"it gave {given}; it must give a list with one score per story")
    for value in values:
        if value is not None and not _is_score(value):
            raise _Refused(
                f"it gave {reprlib.repr(value)}; a score is a number from 0 to 1, or None"
            )
    return [None if value is None else float(value) for value in values]


def _is_score(value: object) -> bool:
    """Whether it is a number in 0..1, numpy's and torch's scalars included."""
    # raised for arrays, complex numbers and 10**400
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return not isinstance(value, str | bytes) and 0 <= float(value) <= 1  # type: ignore[arg-type]
    return False


def _cause(error: BaseException, file: str) -> str:
    """The exception, and the last line of `file` that was running."""
    place = file
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == file:
            place = f"{file}, line {frame.lineno}"
    # Not str(error): the user's __str__ can fail too.
    message = " ".join(str(traceback.TracebackException.from_exception(error)).split())
    cause = f"{place}: {type(error).__name__}"
    return f"{cause}: {message[:200]}" if message else cause


if __name__ == "__main__":
    main()
