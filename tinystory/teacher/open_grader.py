"""The grader that the options describe: a teacher over HTTP, or any callable."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinystory.config import InteractConfig
from tinystory.data import babylm
from tinystory.data.corpus import NO_STORIES
from tinystory.run.credentials import SECRET_NAME, secret_in
from tinystory.run.errors import UserError
from tinystory.run.records import NO_FIELDS, parse_object
from tinystory.teacher.builtin import builtin_teacher
from tinystory.teacher.callable import CallableGrader, load_score
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Grader
from tinystory.teacher.prompt import Example, load_template

# Fields of a request that have options of their own or are set by the client.
OWN_FIELDS = {"model", "messages", "stream", "n", "temperature", "seed", "max_tokens"}
OWN_FIELDS |= {"max_completion_tokens", "extra_body", "extra_headers", "extra_query"}
FIELD_NAME = re.compile(r'"((?:[^"\\]|\\.)*)":')  # in JSON
# Prefixes of keys: at the beginning of a JSON text, and of a longer word within one.
PREFIXES = (
    r"(sk|rk|gsk|csk|hf|gh[opsur]|github_pat|glpat|xai|nvapi|pplx|tvly|npm|pypi)[-_]|r8_|xox[a-z]-|xapp-|AIza|"
    r"ya29\.|eyJ|SG\."
)
SECRET_TEXT = re.compile(
    rf'"(\s|\\[nrt])*((bearer|basic) |-----begin |{PREFIXES}|(AKIA|ASIA)[0-9A-Z]{{16}}")|'
    rf"((?<!\w)|\\[nrt])((bearer )|({PREFIXES})[\w.-]{{8}}|(AKIA|ASIA)[0-9A-Z]{{16}}\b)",
    re.IGNORECASE,
)


@contextlib.contextmanager
def open_grader(
    config: InteractConfig,
    *,
    corpus: Sequence[str] = (),
    replies: Path | None = None,
    likelihood: Callable[[], Grader] | None = None,
    examples: Callable[[], Sequence[Example]] | None = None,
) -> Iterator[Grader]:
    """Yield the grader that the options describe, ready to use. Raises UserError if it cannot be
    had. corpus: as the user named it; the built-in teacher, used if no other grader is named, is
    fitted to it. replies: cache file of a teacher. likelihood: makes the grader of --reward
    likelihood. examples: makes the worked examples of a --teacher-prompt that shows some."""
    extra = load_extra(config.teacher_extra)  # a secret in it is refused whoever grades
    if config.reward == "likelihood" and likelihood:
        yield likelihood()
    elif config.reward:
        with load_score(config.reward, config.teacher_timeout) as score:
            yield CallableGrader(score, config.reward)
    else:
        with contextlib.ExitStack() as stack:
            urls = config.teacher_url
            if not urls:
                assert corpus
                urls = [stack.enter_context(builtin_teacher(story_corpora(corpus)))]
                print(
                    f"no --teacher-url: the built-in teacher, a rubric that stands in for an LLM, is at {urls[0]}"
                )
            template = load_template(config.teacher_prompt)
            if template.asks_yes_or_no and config.preset in babylm.TRACKS:
                raise UserError(
                    f"--teacher-prompt {config.teacher_prompt} asks questions of yes or no, and their answers are "
                    f"probabilities: BabyLM (--preset {config.preset}) does not allow the teacher's probabilities to "
                    "reach the student; use a --teacher-prompt that asks for grades"
                )
            if template.shows_examples and examples:
                template = replace(template, examples=tuple(examples()))
            teacher = Teacher(
                urls,
                config.teacher_model,
                template=template,
                extra=extra,
                seed=config.seed,
                temperature=config.teacher_temperature,
                max_tokens=config.teacher_max_tokens,
                concurrency=config.teacher_concurrency,
                deadline_s=config.teacher_timeout,
                max_unscored=config.max_unscored,
                cache=replies,
                price_in=config.price_in,
                price_out=config.price_out,
                budget_cost=config.budget_cost,
            )
            stack.enter_context(teacher)
            for probe in teacher.probes():
                print(f"teacher: {probe}")
                for note in probe.notes:
                    print(f"warning: {note}")
            yield teacher


@contextlib.contextmanager
def open_judge(
    config: InteractConfig,
    *,
    corpus: Sequence[str],
    replies: Path | None = None,
    examples: Callable[[], Sequence[Example]] | None = None,
) -> Iterator[Grader]:
    """Yield the grader that --judge names, as `open_grader` does."""
    judge = config.judge
    options = InteractConfig(
        preset=config.preset,
        seed=config.seed,
        teacher_model=[config.judge_model] if config.judge_model else [],
        teacher_prompt=config.judge_prompt,
        teacher_concurrency=config.teacher_concurrency,
        teacher_timeout=config.teacher_timeout,
    )
    with contextlib.ExitStack() as stack:
        print(f"second judge: {judge}")
        if judge.startswith(("http://", "https://")):
            options.teacher_url = [judge]
        elif judge == "rubric":
            options.teacher_url = [stack.enter_context(builtin_teacher(story_corpora(corpus)))]
        else:
            options.reward = judge
        yield stack.enter_context(
            open_grader(options, corpus=corpus, replies=replies, examples=examples)
        )


def story_corpora(corpus: Sequence[str]) -> list[str]:
    """The corpora to which a rubric of stories is fitted, of those that the student has read."""
    return [name for name in corpus if name not in NO_STORIES] or list(corpus)


def load_extra(text: str) -> dict[str, Any]:
    """Parse --teacher-extra, a JSON object of request fields. Raises UserError for anything else
    and, since options are recorded, for what looks like a secret at any depth."""
    try:
        fields = parse_object(text or "{}", NO_FIELDS)
    except ValueError as error:
        message = (
            f'--teacher-extra must be a JSON object such as \'{{"service_tier": "flex"}}\': {error}'
        )
        raise UserError(message) from None
    taken = sorted(OWN_FIELDS & fields.keys())
    if taken:
        raise UserError(
            f"--teacher-extra cannot set {taken[0]}, which is set by another option or by the client; headers "
            "are OPENAI_CUSTOM_HEADERS"
        )
    forms = f"{text} {json.dumps(fields)}"  # as it is recorded, and without escapes
    names_a_secret = any(map(SECRET_NAME.search, FIELD_NAME.findall(forms)))
    if names_a_secret or SECRET_TEXT.search(forms) or secret_in(forms):
        raise UserError(
            "--teacher-extra is recorded, so it must hold no secret: use OPENAI_API_KEY or OPENAI_CUSTOM_HEADERS"
        )
    return fields
