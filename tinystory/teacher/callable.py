"""A user's Python function as the teacher. The function runs in a subprocess, so that a failure of
the function does not cost the run's results.

The function is `f(opening, stories)`, or `f(openings, stories)` for all stories of a step at once.
It returns one score per story: a number in 0..1, a list of numbers that sum to one, for each word of
the story and for its end, or None. A story with None has no reward and no gradient, and is counted as
unscored."""

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
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tinystory.run.errors import UserError
from tinystory.run.paths import ROOT
from tinystory.teacher.grade import LocalGrader, Score, Submission, total

# Function from the openings and stories of a step to scores.
ScoreStories = Callable[[Sequence[str], Sequence[str]], Sequence[Score]]
MOST_OF_A_WORD = 1000  # bound on the numbers in a list, against overflow
FUNCTION = "score"  # name of the function if --reward is FILE.py without :FUNCTION


class CallableGrader(LocalGrader):
    """A grader that calls a Python function. name: reported as the teacher's name."""

    def __init__(self, function: ScoreStories, name: str):
        super().__init__({"scored_by": name})
        self.function = function

    def scores(self, submissions: Sequence[Submission]) -> Sequence[Score]:
        openings = [submission.opening for submission in submissions]
        stories = [submission.story for submission in submissions]
        return self.function(openings, stories)


def random_scores(openings: Sequence[str], stories: Sequence[str]) -> list[float]:
    """Random scores, for `--reward random`, the control that separates drift from learning. Each
    score is the sum of three numbers in 0..3, divided by 9, as a teacher's score is. The numbers
    are derived from a hash of the story."""
    scores: list[float] = []
    for story in stories:
        digest = hashlib.blake2b(story.encode("utf-8", "replace"), digest_size=3).digest()
        scores.append(sum(byte % 4 for byte in digest) / 9)
    return scores


CONTROLS: dict[str, ScoreStories] = {
    "random": random_scores,
    # with a constant score, the student learns only the other terms of the reward
    "constant": lambda openings, stories: [0.5] * len(stories),
}


@contextlib.contextmanager
def load_score(
    spec: str, timeout_s: float = 300.0, option: str = "--reward"
) -> Iterator[ScoreStories]:
    """Yields the scoring function that `spec` names: one of CONTROLS, or FILE.py:FUNCTION (default:
    `score`), which runs in a subprocess until the block ends. Raises UserError if there is no such
    function. A call raises UserError if the function fails, exits, takes longer than `timeout_s`,
    or does not return one number in 0..1 or None per story. option: the option that named it."""
    if spec in CONTROLS:
        yield CONTROLS[spec]
        return
    file, _, name = spec.rpartition(":")
    if spec.endswith(".py"):
        file = spec
        name = FUNCTION
    if not (file.endswith(".py") and Path(file).is_file()):
        raise UserError(
            f"{option} {spec}: there is no Python file {file or spec!r}; write {option} as FILE.py or "
            "FILE.py:FUNCTION"
        )
    ours, theirs = multiprocessing.Pipe()
    command = [sys.executable, "-u", "-m", __name__, file, name, str(theirs.fileno())]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    with theirs:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
    with process, ours:
        function = RemoteFunction(f"{option} {spec}", file, process, ours, timeout_s)
        try:
            first_parameter = function.answer()
            yield function.ask if first_parameter == "openings" else function.by_opening
        finally:
            process.kill()


@dataclass
class RemoteFunction:
    """The user's function in a subprocess."""

    option: str  # the option as the user gave it
    file: str
    process: subprocess.Popen
    connection: Connection
    timeout_s: float

    def ask(self, opening: str | Sequence[str], stories: Sequence[str]) -> Any:
        """The function's scores for stories with this opening, or with these openings. Raises
        UserError if the function fails."""
        # if the subprocess exited before it read the request, `answer` reports that
        with contextlib.suppress(ConnectionError):
            self.connection.send((opening, stories))
        return self.answer()

    def answer(self) -> Any:
        """The next value that the subprocess sends. Raises UserError if the function fails, exits,
        or takes longer than `timeout_s`."""
        try:
            if not self.connection.poll(self.timeout_s):
                limit = f"{self.timeout_s:g} s (--teacher-timeout)"
                raise UserError(
                    f"{self.option}: {self.file}: the function took more than {limit}: make it "
                    "faster, or raise --teacher-timeout"
                )
            error, answer = self.connection.recv()
        except (EOFError, ConnectionError):
            # the subprocess may have closed only the connection
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            code = self.process.returncode
            raise UserError(
                f"{self.option}: {self.file}: the function must return, but it ended the process (exit code {code})"
            ) from None
        if error:
            raise UserError(f"{self.option}: {error}")
        return answer

    def by_opening(self, openings: Sequence[str], stories: Sequence[str]) -> list[Score]:
        """Scores of all stories, in order, from one call of the function per opening."""
        scores: list[Score] = [None] * len(stories)
        for opening in dict.fromkeys(openings):
            rows = [row for row, other in enumerate(openings) if other == opening]
            of_opening = self.ask(opening, [stories[row] for row in rows])
            for row, score in zip(rows, of_opening, strict=True):
                scores[row] = score
        return scores


# ---- in the subprocess ---------------------------------------------------------------------------


class _Refused(Exception):
    """The function or the return value is not valid; the message says why."""


def main() -> None:
    file, name, descriptor = sys.argv[1:]
    sys.argv = [file]
    # ignored, because the trainer still needs scores to finish the step
    for ended in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ended, signal.SIG_IGN)
    with Connection(int(descriptor)) as connection:
        try:
            _serve(file, name, connection)
        except BaseException as error:  # the user's code can raise anything, SystemExit included
            message = str(error) if isinstance(error, _Refused) else _cause(error, file)
            with contextlib.suppress(ConnectionError):  # the trainer has ended
                connection.send((message, None))


def _serve(file: str, name: str, connection: Connection) -> None:
    """Send the name of the function's first parameter. Then, for each (opening(s), stories)
    received, send the scores."""
    sys.path.insert(0, str(Path(file).resolve().parent))  # as `python FILE.py` does
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
        connection.send(("", _checked(function(opening, stories), stories)))


def _checked(scores: Any, stories: Sequence[str]) -> list[Score]:
    """The scores, one per story. Raises _Refused for any other value."""
    is_list = scores is not None and not isinstance(scores, str | Mapping | Set)
    values = list(scores) if is_list else []
    if len(values) != len(stories):
        answer = reprlib.repr(scores)
        if is_list:
            answer = f"{len(values)} scores for {len(stories)} stories"
        raise _Refused(
            f"the function returned {answer}; it must return a list with one score per story"
        )
    return [_score(*pair) for pair in zip(values, stories, strict=True)]


def _score(value: Any, story: str) -> Score:
    """The score of a story. Scalars and arrays of NumPy and PyTorch count as numbers and lists.
    Raises _Refused for any other value."""
    plain = _plain(value)
    if plain is None:
        return None
    if isinstance(plain, list | tuple):
        return _by_word([_plain(each) for each in plain], story)
    if type(plain) in (int, float) and 0 <= plain <= 1:
        return float(plain)
    raise _Refused(
        f"the function returned {reprlib.repr(value)}; a score must be a number from 0 to 1, a list of "
        "numbers for the story's words and its end, or None"
    )


def _plain(value: Any) -> Any:
    """A scalar or an array of NumPy or PyTorch as Python's numbers; any other value as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _by_word(values: Sequence[Any], story: str) -> tuple[float, ...]:
    """The scores of a story's words and of its end. Raises _Refused for any other value."""
    words = len(story.split())
    if len(values) != words + 1:
        raise _Refused(
            f"the function returned {len(values)} numbers for a story of {words} words; a list must have "
            "one number per word (story.split()), and one for the end of the story"
        )
    are_numbers = all(
        type(value) in (int, float) and abs(value) <= MOST_OF_A_WORD for value in values
    )
    if not are_numbers or not 0 <= total(values) <= 1:
        raise _Refused(
            f"the function returned {reprlib.repr(values)}; a list must have numbers from "
            f"-{MOST_OF_A_WORD} to {MOST_OF_A_WORD} that sum to a score from 0 to 1"
        )
    return tuple(map(float, values))


def _cause(error: BaseException, file: str) -> str:
    """One line with the type and message of the exception and the last line of `file` that was
    running."""
    place = file
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == file:
            place = f"{file}, line {frame.lineno}"
    # TracebackException instead of str(error), because the user's __str__ can fail too
    message = " ".join(str(traceback.TracebackException.from_exception(error)).split())
    cause = f"{place}: {type(error).__name__}"
    return f"{cause}: {message[:200]}" if message else cause


if __name__ == "__main__":
    main()
