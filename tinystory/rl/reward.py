"""From the teacher's score of a story to its reward, the number that PPO maximises.

A story earns its score, multiplied by how different it is from the other stories of its step (as DARLING does, arXiv
2509.02534), and the paper's length term; a story that is cut off keeps a part of that.

Anything can be the teacher: any callable `f(opening, stories)` that returns one score per story, 0..1 or None, or
`f(openings, stories)`, which is given all stories of a step at once, each with its opening. None is no score: the story
gets no reward and no gradient, and it is counted.
"""

import contextlib
import hashlib
import inspect
import runpy
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tinystory.config import InteractConfig
from tinystory.run.errors import UserError

if TYPE_CHECKING:  # reports need no torch
    from tinystory.student.generate import Story

ScoreStories = Callable[[Sequence[str], Sequence[str]], Sequence[float | None]]  # openings and stories of a step


def story_rewards(
    config: InteractConfig, stories: Sequence["Story"], scores: Sequence[float | None]
) -> list[float | None]:
    """The reward of each story of a step, None without a score. All of them count when it is compared with others."""
    return [
        None if score is None else story_reward(config, score, difference, story.words, story.ended == "eos")
        for story, score, difference in zip(stories, scores, differences([s.text for s in stories]), strict=True)
    ]


def story_reward(config: InteractConfig, score: float, difference: float, words: int, ended: bool) -> float:
    """(score * (1 - diversity + diversity * difference) + length_weight * words / length_words) / (1 + length_weight),
    times `unfinished` for a story that was cut off: 0..1.

    score, difference: 0..1. The length term, at most length_weight, keeps stories from shrinking (arXiv 2509.15714,
    whose reward this is with diversity 0 and unfinished 1). words: whitespace-separated words that the student wrote.
    """
    quality = score * (1 - config.diversity + config.diversity * difference)
    length = min(words / config.length_words, 1.0)
    reward = (quality + config.length_weight * length) / (1 + config.length_weight)
    return reward if ended else reward * config.unfinished


def best_of_n(values: Sequence[Any], count: int) -> list[int]:
    """The index of the largest of values[i::count], for each i below count; None, no score, is less than any."""
    groups = (range(i, len(values), count) for i in range(count))
    return [max(group, key=lambda i: (values[i] is not None, values[i])) for group in groups]


def differences(stories: Sequence[str]) -> list[float]:
    """How different each story is from the others, 0..1: the mean over its distinct phrases of 1 / (number of stories
    that contain the phrase). 1 if it shares none; 0 for a story too short to contain one."""
    grams = [phrases(story) for story in stories]
    counts = Counter(gram for distinct in grams for gram in distinct)
    return [sum(1 / counts[gram] for gram in distinct) / len(distinct) if distinct else 0.0 for distinct in grams]


def phrases(story: str, n: int = 4) -> set[tuple[str, ...]]:
    """The distinct n-grams of a story's words, in lower case and without punctuation. Capitalised words, names among
    them, count as one word: a story told again about someone else is not a different one."""
    words = ["@" if word[:1].isupper() else word.lower().strip('.,;:!?"') for word in story.split()]
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def cluster_sizes(texts: Sequence[str], threshold: float = 0.12) -> list[int]:
    """Sizes of the clusters of near-duplicate stories (`cluster_ids`), largest first."""
    return sorted(Counter(cluster_ids(texts, threshold)).values(), reverse=True)


def cluster_ids(texts: Sequence[str], threshold: float = 0.12) -> list[int]:
    """The cluster of each text, numbered from 0 by first appearance. A text joins the first cluster with whose founder
    it shares more than `threshold` of their word 3-grams (Jaccard; capitalised words count as one word), or founds one.
    """
    ids: list[int] = []
    sizes: list[int] = []  # of the founders, in 3-grams
    founders: dict[tuple[str, ...], list[int]] = {}  # by 3-gram
    for text in texts:
        grams = phrases(text, 3)
        shared = Counter(founder for gram in grams for founder in founders.get(gram, ()))
        near = [i for i, count in shared.items() if count > threshold * (len(grams) + sizes[i] - count)]
        ids.append(min(near, default=len(sizes)))
        if not near:
            for gram in grams:
                founders.setdefault(gram, []).append(len(sizes))
            sizes.append(len(grams))
    return ids


def random_scores(openings: Sequence[str], stories: Sequence[str]) -> list[float]:
    """The control that tells drift from learning, `--reward random`. Per story, the sum of three scores from 0 to 3
    divided by 9, as from a teacher, but drawn from the story's hash. The other terms of the reward stay the same."""
    digests = (hashlib.blake2b(story.encode("utf-8", "replace"), digest_size=3).digest() for story in stories)
    return [sum(byte % 4 for byte in digest) / 9 for digest in digests]


def load_score(spec: str, timeout_s: float = 300.0) -> ScoreStories:
    """`random_scores` for "random", else the function named by FILE.py:FUNCTION, with its scores checked at each call.
    Raises UserError if there is none, if its file or a call of it fails or takes longer than `timeout_s`, and from a
    call whose scores are not one number in 0..1 or None per story. To be called on the main thread."""
    if spec == "random":
        return random_scores
    file, _, name = spec.rpartition(":")
    if not (Path(file).is_file() and file.endswith(".py")):
        raise UserError(f"--reward {spec}: there is no Python file {file!r}; write it as FILE.py:FUNCTION")
    with _user_code(spec, file, timeout_s):
        function = runpy.run_path(file, run_name=Path(file).stem).get(name)
    if not callable(function):
        raise UserError(f"--reward {spec}: {file} has no function {name!r}")

    def by_opening(openings: Sequence[str], stories: Sequence[str]) -> Sequence[float | None]:
        scores: dict[int, float | None] = {}
        for opening in dict.fromkeys(openings):
            rows = [i for i, other in enumerate(openings) if other == opening]
            scores |= zip(rows, call(opening, [stories[i] for i in rows]), strict=True)
        return [scores[i] for i in range(len(stories))]

    def call(opening: str | Sequence[str], stories: Sequence[str]) -> Sequence[float | None]:
        with _user_code(spec, file, timeout_s):  # also the scores' own methods
            scores = function(opening, stories)
            if scores is None or isinstance(scores, str):
                raise UserError(f"--reward {spec} gave {_short(scores)}; it must give a list with one score per story")
            scores = list(scores)
            if len(scores) != len(stories):
                problem = f"gave {len(scores)} scores for {len(stories)} stories"
                raise UserError(f"--reward {spec} {problem}; it must give one per story")
            for value in scores:
                if value is not None and not _is_score(value):
                    raise UserError(f"--reward {spec} gave {_short(value)}; a score is a number from 0 to 1, or None")
            return [None if value is None else float(value) for value in scores]

    with contextlib.suppress(TypeError, ValueError):  # a callable without a signature
        if next(iter(inspect.signature(function).parameters), "") == "openings":
            return call
    return by_opening


def _is_score(value: object) -> bool:
    """Whether it is a number from 0 to 1 of any library's; text that reads as one is none."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):  # of arrays, complex numbers and 10**400
        return not isinstance(value, str | bytes) and 0 <= float(value) <= 1  # type: ignore[arg-type]
    return False


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


class _TooSlow(BaseException):
    """Ends the user's code, whose `except Exception` does not stop it."""


@contextlib.contextmanager
def _user_code(spec: str, file: str, timeout_s: float) -> Iterator[None]:
    """Whatever the user's code raises, an exit included, ends in one sentence with the last line of that file that was
    running. It gets `timeout_s` seconds, and what it does to torch's settings is undone."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise _TooSlow(f"it took more than {timeout_s:g} s (--teacher-timeout)")

    handler = signal.signal(signal.SIGALRM, end)
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_s, 1.0)  # and each second, should the code go on
        with _torch_settings_restored():
            yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the user's code can raise anything; the cause stays attached
        signal.setitimer(signal.ITIMER_REAL, 0)
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == Path(file).resolve()]
        at = f"{file}, line {lines[-1]}" if lines else file
        if isinstance(error, SyntaxError):
            at, message = f"{error.filename or file}, line {error.lineno}", error.msg
        else:  # whose own str() can fail too
            message = " ".join(str(traceback.TracebackException.from_exception(error)).split())
        kind = "" if isinstance(error, _TooSlow) else type(error).__name__ + ": " * bool(message)
        raise UserError(f"--reward {spec} failed in {at}: {kind}{message[:200]}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def _torch_settings_restored() -> Iterator[None]:
    import torch  # here, because reports do not need it

    dtype, device, threads = torch.get_default_dtype(), torch.empty(0).device, torch.get_num_threads()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # which restores the mode
            yield
    finally:
        torch.set_default_dtype(dtype)
        if torch.empty(0).device != device:  # from then on torch 2.9's get_default_device fails
            torch.set_default_device(None)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
