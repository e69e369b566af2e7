"""From the options to whoever scores the stories: a teacher over HTTP, or any callable."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from tinystory.config import InteractConfig
from tinystory.data.corpus import NO_STORIES
from tinystory.run.errors import UserError
from tinystory.teacher.callable import CallableGrader, ScoreStories, load_score
from tinystory.teacher.client import Teacher
from tinystory.teacher.extra import load_extra
from tinystory.teacher.grade import Grader
from tinystory.teacher.prompt import load_template
from tinystory.teacher.rank import Ranked


@contextlib.contextmanager
def open_grader(
    config: InteractConfig,
    builtin_teacher: Callable[[Sequence[str]], AbstractContextManager[str]] | None = None,
    *,
    corpus: Sequence[str] | None,
    replies: Path | None = None,
    likelihood: Callable[[], ScoreStories] | None = None,
) -> Iterator[Grader]:
    """The grader that the options describe, probed and ready, for as long as the block lasts; its `send` and `collect`
    rank with --teacher-mode rank.

    builtin_teacher: starts a teacher that knows a corpus, and yields its URL, for options that name no other grader.
    corpus: the student's, and so that teacher's by default; None if unknown. replies: file in which a teacher's replies
    are kept. likelihood: makes the scores of --reward likelihood. Raises UserError if the grader cannot be had."""
    extra = load_extra(config.teacher_extra)
    if config.reward:
        if config.reward == "likelihood" and likelihood:
            yield CallableGrader(likelihood(), config.reward)
            return
        with load_score(config.reward, config.teacher_timeout) as score:
            yield CallableGrader(score, config.reward)
        return
    with contextlib.ExitStack() as stack:
        urls = config.teacher_url
        if not urls:
            assert builtin_teacher is not None
            urls = [stack.enter_context(builtin_teacher(_measured_by(config, corpus or [])))]
            print(f"no --teacher-url: the built-in teacher, a rubric that stands in for an LLM, is at {urls[0]}")
        teacher = Teacher(
            urls,
            config.teacher_model,
            template=load_template(config.teacher_prompt),
            max_tokens=config.teacher_max_tokens,
            logprobs=config.teacher_logprobs,
            concurrency=config.teacher_concurrency,
            seed=config.seed,
            temperature=config.teacher_temperature,
            extra=extra,
            deadline_s=config.teacher_timeout,
            max_unscored=config.max_unscored,
            cache=replies,
            price_in=config.price_in,
            price_out=config.price_out,
            budget_cost=config.budget_cost or None,
        )
        stack.enter_context(teacher)
        for probe in teacher.probes():
            print(f"teacher: {probe}")
            for note in probe.notes:
                print(f"warning: {note}")
        for message in teacher.news():
            print(f"warning: {message}")
        ranks = config.teacher_mode == "rank"
        yield Ranked(teacher, teacher.template, config.stories_per_opening) if ranks else teacher


def _measured_by(config: InteractConfig, corpus: Sequence[str]) -> Sequence[str]:
    """The corpus of the built-in teacher: of the student's, the part that is stories."""
    names = config.teacher_corpus or [name for name in corpus if name not in NO_STORIES] or corpus
    if not names:
        raise UserError(f"{config.init} does not say what the student was trained on: give --teacher-corpus NAME|FILE")
    return names
