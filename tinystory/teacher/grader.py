"""Who scores the stories: a teacher over HTTP, the replies of a recorded run, or any callable, behind one interface.

`open_grader` builds it from the options; train_interact.py, scripts/evaluate.py and scripts/reproduce.py all use it.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinystory.config import InteractConfig
from tinystory.rl.reward import ScoreStories, load_score
from tinystory.rubric.process import builtin_teacher
from tinystory.run.device import Stop
from tinystory.run.errors import UserError
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Grade, too_few_scores
from tinystory.teacher.prompt import Template, load_template
from tinystory.teacher.replay import Replay


class TeacherGrader:
    """Stories are graded by a teacher. facts: what config.json records about it. max_unscored: see `_finished`."""

    def __init__(self, teacher: Teacher | Replay, max_unscored: float = 1.0):
        self.teacher, self.max_unscored = teacher, max_unscored
        self.pending: dict[int, tuple[str, str, Future[Grade]]] = {}  # opening, story, grade
        found = teacher.probes()
        how = f"{teacher.panel} of " if teacher.panel else ""
        self.facts: dict[str, Any] = {
            "scored_by": how + ", ".join(f"{each.model} at {each.url}" for each in found),
            "teacher": dataclasses.asdict(found[0]),
        }
        if len(found) > 1:
            self.facts["teachers"] = [dataclasses.asdict(each) for each in found]

    @property
    def most_words(self) -> int:
        """Upper bound on the words in the replies to one story."""
        return self.teacher.most_words

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

    def stats(self) -> dict[str, Any]:
        """The teacher's metrics since the last call."""
        return {f"teacher_{name}": value for name, value in self.teacher.stats().items()}

    def send(self, index: int, opening: str, text: str) -> None:
        """Send a story as soon as it ends: the teacher grades it while the student writes the others."""
        self.pending[index] = opening, text, self.teacher.submit(opening, text, index)

    def collect(self, stop: Stop) -> list[Grade]:
        """The grades of all stories sent, in the order of their indices. Raises Interrupted if `stop` is requested, and
        UserError for a fatal failure of the teacher."""
        sent = sorted(self.pending.items())
        self.pending = {}
        stories = [(opening, text, index) for index, (opening, text, _) in sent]
        return self._finished(stories, [future for _, (_, _, future) in sent], stop)

    def grade(self, opening: str, stories: Sequence[str]) -> list[Grade]:
        """The grades of stories to any opening, in their order, for an evaluation."""
        return self.grade_each([(opening, story) for story in stories])

    def grade_each(self, told: Sequence[tuple[str, str]], again: int = 0) -> list[Grade]:
        """The grades of (opening, story) pairs, in their order. again: 1 for a second answer to the same questions."""
        stories = [(*each, index) for index, each in enumerate(told)]
        return self._finished(stories, [self.teacher.submit(*each, again) for each in stories], Stop(), again)

    def _finished(
        self, stories: list[tuple[str, str, int]], futures: list[Future[Grade]], stop: Stop, again: int = 0
    ) -> list[Grade]:
        """The grades. If more than a fraction `max_unscored` has no score, the stories whose replies an earlier process
        kept are asked again: the teacher may have been mended."""
        grades = self._wait(futures, stop)
        if too_few_scores(grades, self.max_unscored):
            kept = [i for i, grade in enumerate(grades) if grade.score is None and grade.attempts and not grade.seconds]
            afresh = [self.teacher.submit(*stories[i], again, afresh=True) for i in kept]
            for i, grade in zip(kept, self._wait(afresh, stop), strict=True):
                grades[i] = grade
        for told in self.teacher.news():
            tqdm.write(f"warning: {told}")
        return grades

    def _wait(self, futures: list[Future[Grade]], stop: Stop) -> list[Grade]:
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

    def stats(self) -> dict[str, Any]:
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
        unscored = Grade(None, None, error=f"{self.facts['scored_by']} gave None")
        return [unscored if score is None else Grade(None, score) for score in self.function(opening, stories)]

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
    extra = load_extra(config.teacher_extra)
    if config.reward:
        yield CallableGrader(load_score(config.reward, config.teacher_timeout), config.reward)
        return
    panel = "" if config.teacher_panel == "none" else config.teacher_panel
    template = load_template(config.teacher_prompt) if config.teacher_prompt else Template()
    teacher: Teacher | Replay
    with contextlib.ExitStack() as stack:
        if config.replay:
            teacher = Replay(
                Path(config.replay),
                template=template,
                max_tokens=config.teacher_max_tokens,
                logprobs=config.teacher_logprobs,
                panel=panel,
            )
        else:
            urls = config.teacher_url
            if not urls:
                stories = [name for name in corpus or [] if name != "primer"]  # which no story should be measured by
                measured_by = config.teacher_corpus or stories or corpus
                if not measured_by:
                    raise UserError(
                        f"{config.init} does not say what the student has read: give --teacher-corpus NAME|FILE"
                    )
                urls = [stack.enter_context(builtin_teacher(measured_by))]
                print(f"no --teacher-url: the built-in teacher, a rubric that stands in for an LLM, is at {urls[0]}")
            teacher = stack.enter_context(
                Teacher(
                    urls,
                    config.teacher_model,
                    panel=panel,
                    extra=extra,
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
        for probed in teacher.probes():
            print(f"teacher: {probed}")
            for note in probed.notes:
                print(f"warning: {note}")
        for told in teacher.news():
            print(f"warning: {told}")
        yield TeacherGrader(teacher, config.max_unscored)


# Fields of a request that options of their own, or the client, set.
OWN_FIELDS = {"model", "messages", "stream", "n", "temperature", "seed", "max_tokens", "max_completion_tokens"}
OWN_FIELDS |= {"logprobs", "top_logprobs", "extra_body", "extra_query"}
# Credentials, by name (not prompt_cache_key, stop_token_ids, skip_special_tokens or tokenizer) and by how they begin.
SECRET_NAME = re.compile(
    r"auth(?!or$)|bearer|cookie|credential|pass(p|w|$)|secret|signature|(?<!cache_)key|token(?!s|_|i)", re.IGNORECASE
)
SECRET_VALUE = re.compile(r"(bearer|basic) |(sk|gsk|hf|ghp|xai|nvapi)[-_]|AIza|eyJ", re.IGNORECASE)


def load_extra(text: str) -> dict[str, Any]:
    """The fields that --teacher-extra merges into each request; "extra_headers" in it are headers. Raises UserError for
    anything else, and for what looks like a secret at any depth, since options are recorded."""

    def no_number(text: str) -> None:
        raise ValueError(text)

    def without_secrets(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, value in pairs:
            if SECRET_NAME.search(name) or (isinstance(value, str) and SECRET_VALUE.match(value)):
                raise UserError(
                    f"--teacher-extra is recorded, so it must hold no secret such as {name}: use OPENAI_API_KEY"
                )
        return dict(pairs)

    try:
        found = json.loads(text or "{}", parse_constant=no_number, object_pairs_hook=without_secrets)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError('--teacher-extra must be a JSON object such as \'{"service_tier": "flex"}\'')
    if taken := sorted(OWN_FIELDS & found.keys()):
        raise UserError(f"--teacher-extra cannot set {taken[0]}: it has an option of its own, or the client needs it")
    headers = found.get("extra_headers", {})
    if not isinstance(headers, dict) or not all(_is_header(*each) for each in headers.items()):
        raise UserError("--teacher-extra: extra_headers must be an object whose values are one line of text each")
    return found


def _is_header(name: str, value: object) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9-]+", name)) and isinstance(value, str) and bool(re.fullmatch("[ -~]*", value))
