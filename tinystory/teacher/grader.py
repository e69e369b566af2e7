"""Who scores the stories: a teacher over HTTP, the replies of a recorded run, or any callable, behind one interface.

`open_grader` builds it from the options; train_interact.py, scripts/evaluate.py and scripts/reproduce.py all use it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinystory.config import InteractConfig
from tinystory.device import Stop
from tinystory.errors import UserError
from tinystory.reward import ScoreStories, load_score
from tinystory.rubric.process import builtin_teacher
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Grade
from tinystory.teacher.prompt import Template, load_template
from tinystory.teacher.replay import Replay


class TeacherGrader:
    """Stories are graded by a teacher. facts: what config.json records about it."""

    def __init__(self, teacher: Teacher | Replay):
        self.teacher = teacher
        self.pending: dict[int, Future[Grade]] = {}
        probed = teacher.probe()
        self.facts: dict[str, Any] = {
            "scored_by": f"{probed.model} at {probed.url}",
            "teacher": dataclasses.asdict(probed),
        }

    @property
    def most_words(self) -> int:
        """Upper bound on the words in the replies to one story: a word is at least one token."""
        return self.teacher.max_tokens * self.teacher.attempts

    def affords(self, stories: int) -> bool:
        return self.teacher.affords(stories)

    def forecast(self, stories: int, opening: str) -> str:
        """One sentence on what so many stories to such an opening will take; empty if they take nothing."""
        foreseen = self.teacher.forecast(stories, opening)
        if not foreseen:
            return ""
        cost = f", cost {foreseen['cost']:.2f}" if foreseen["cost"] else ""
        return (
            f"{foreseen['stories']:,} stories, {foreseen['tokens_in']:,} prompt tokens and {foreseen['tokens_out']:,} "
            f"reply tokens, {foreseen['words']:,} words for the student{cost}, about {foreseen['hours']:.1f} hours of "
            "grading"
        )

    def stats(self) -> dict[str, float | None]:
        """The teacher's metrics since the last call."""
        return {f"teacher_{name}": value for name, value in self.teacher.stats().items()}

    def send(self, index: int, opening: str, text: str) -> None:
        """Send a story as soon as it ends: the teacher grades it while the student writes the others."""
        self.pending[index] = self.teacher.submit(opening, text, index)

    def collect(self, stop: Stop) -> list[Grade]:
        """The grades of all stories sent, in the order of their indices. Raises Interrupted if `stop` is requested, and
        UserError for a fatal failure of the teacher."""
        futures = [self.pending[index] for index in sorted(self.pending)]
        self.pending = {}
        waiting = set(futures)
        with tqdm(total=len(futures), desc="teacher", unit="story", leave=False, delay=2) as bar:
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                bar.update(len(done))
                for future in done:
                    future.result()  # a fatal failure (bad key, unknown model) ends the wait at once
                if waiting and stop.requested:
                    for future in waiting:
                        future.cancel()
                    stop.check()
        return [future.result() for future in futures]

    def grade(self, opening: str, stories: Sequence[str]) -> list[Grade]:
        """The grades of stories to any opening, in their order, for an evaluation."""
        return self.grade_each([(opening, story) for story in stories])

    def grade_each(self, told: Sequence[tuple[str, str]], again: int = 0) -> list[Grade]:
        """The grades of (opening, story) pairs, in their order. again: 1 for a second answer to the same questions."""
        futures = [self.teacher.submit(*each, index, again) for index, each in enumerate(told)]
        return [future.result() for future in futures]


class CallableGrader:
    """Stories are scored by `function`. The student takes in no words, and nothing costs anything."""

    most_words = 0

    def __init__(self, function: ScoreStories, name: str):
        self.function = function
        self.pending: dict[int, tuple[str, str]] = {}  # opening and story
        self.facts: dict[str, Any] = {"scored_by": name}

    def affords(self, stories: int) -> bool:
        return True

    def forecast(self, stories: int, opening: str) -> str:
        return ""

    def stats(self) -> dict[str, float | None]:
        return {}

    def send(self, index: int, opening: str, text: str) -> None:
        self.pending[index] = opening, text

    def collect(self, stop: Stop) -> list[Grade]:
        sent = [self.pending[index] for index in sorted(self.pending)]
        self.pending = {}
        grades: dict[int, Grade] = {}
        for opening in dict.fromkeys(opening for opening, _ in sent):
            at = [i for i, (own, _) in enumerate(sent) if own == opening]
            grades |= zip(at, self.grade(opening, [sent[i][1] for i in at]), strict=True)
        return [grades[i] for i in range(len(sent))]

    def grade(self, opening: str, stories: Sequence[str]) -> list[Grade]:
        return [Grade(scores=None, score=score) for score in self.function(opening, stories)]

    def grade_each(self, told: Sequence[tuple[str, str]], again: int = 0) -> list[Grade]:
        return [self.grade(opening, [story])[0] for opening, story in told]


Grader = TeacherGrader | CallableGrader


@contextlib.contextmanager
def open_grader(
    config: InteractConfig, *, corpus: Sequence[str] | None, replies: Path | None = None
) -> Iterator[Grader]:
    """The grader that the options describe, probed and ready, for as long as the block lasts.

    corpus: what the student has read, and so the built-in teacher by default; None if unknown. replies: file in which a
    teacher's replies are kept. Raises UserError if the grader cannot be had."""
    if config.reward:
        yield CallableGrader(load_score(config.reward), config.reward)
        return
    template = load_template(config.teacher_prompt) if config.teacher_prompt else Template()
    teacher: Teacher | Replay
    with contextlib.ExitStack() as stack:
        if config.replay:
            teacher = Replay(
                Path(config.replay),
                template=template,
                max_tokens=config.teacher_max_tokens,
                logprobs=config.teacher_logprobs,
            )
        else:
            url = config.teacher_url
            if not url:
                stories = [name for name in corpus or [] if name != "primer"]  # which no story should be measured by
                measured_by = config.teacher_corpus or stories or corpus
                if not measured_by:
                    raise UserError(
                        f"{config.init} does not say what the student has read: give --teacher-corpus NAME|FILE"
                    )
                url = stack.enter_context(builtin_teacher(measured_by))
                print(f"no --teacher-url: the built-in teacher, a rubric that stands in for an LLM, is at {url}")
            teacher = stack.enter_context(
                Teacher(
                    url,
                    config.teacher_model or None,
                    concurrency=config.teacher_concurrency,
                    seed=config.seed,
                    temperature=config.teacher_temperature,
                    max_tokens=config.teacher_max_tokens,
                    deadline_s=config.teacher_timeout,
                    cache=replies,
                    template=template,
                    logprobs=config.teacher_logprobs,
                    price_in=config.price_in,
                    price_out=config.price_out,
                    budget_cost=config.budget_cost or None,
                )
            )
        probed = teacher.probe()
        print(f"teacher: {probed}")
        if not probed.scored:
            print(f"warning: {probed.model} was shown a story and gave no scores but {probed.reply[:80]!r}")
        yield TeacherGrader(teacher)
