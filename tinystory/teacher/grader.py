"""Who scores a step's stories, a teacher over HTTP or any callable, behind one face."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass

from tqdm import tqdm

from tinystory.device import Stop
from tinystory.teacher.client import Teacher
from tinystory.teacher.judgement import Judgement
from tinystory.teacher.replay import Replay


@dataclass
class Grade:
    """One story's. score: what the reward is made of, the teacher's weighted mean, 0..1; None is no score.
    words: of every reply to it, for the budget."""

    score: float | None
    scores: dict[str, float] | None
    reply: str
    words: int


class TeacherGrader:
    def __init__(self, teacher: Teacher | Replay, opening: str):
        self.teacher, self.opening = teacher, opening
        self.pending: dict[int, Future[Judgement]] = {}

    @property
    def most_words(self) -> int:
        """Most words that the replies to one story can hold: a word is at least one token."""
        return self.teacher.max_tokens * self.teacher.attempts

    def affords(self, stories: int) -> bool:
        return self.teacher.affords(stories)

    def stats(self) -> dict[str, float | None]:
        """What asking took since the last call, for the metrics."""
        return {f"teacher_{name}": value for name, value in self.teacher.stats().items()}

    def send(self, index: int, text: str) -> None:
        """Hand over a story as soon as it ends: the teacher reads while the student goes on writing."""
        self.pending[index] = self.teacher.submit(self.opening, text, index)

    def collect(self, stop: Stop) -> list[Grade]:
        """Grades of all that was sent, in the order of their indices. Raises Interrupted if an end is asked for."""
        futures = [self.pending[index] for index in sorted(self.pending)]
        self.pending = {}
        waiting = set(futures)
        with tqdm(total=len(futures), desc="teacher", unit="story", leave=False, delay=2) as bar:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                bar.update(len(done))
                for future in done:
                    future.result()  # a fatal answer (bad key, unknown model) ends the wait at once
                if waiting and stop.requested:
                    for future in waiting:
                        future.cancel()
                    stop.check()
        return [_grade(future.result()) for future in futures]


class CallableGrader:
    most_words = 0  # the student takes in no words of a callable

    def __init__(self, score: Callable[[str, Sequence[str]], Sequence[float | None]], opening: str):
        self.score, self.opening = score, opening
        self.pending: dict[int, str] = {}

    def affords(self, stories: int) -> bool:
        return True

    def stats(self) -> dict[str, float | None]:
        return {}

    def send(self, index: int, text: str) -> None:
        self.pending[index] = text

    def collect(self, stop: Stop) -> list[Grade]:
        texts = [self.pending[index] for index in sorted(self.pending)]
        self.pending = {}
        return [Grade(score, None, "", 0) for score in self.score(self.opening, texts)]


def _grade(judgement: Judgement) -> Grade:
    return Grade(judgement.score, judgement.scores, judgement.reply or judgement.error or "", judgement.reply_words)
