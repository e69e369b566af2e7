"""Build the grader that the options describe: a teacher over HTTP, or any callable."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tinystory.config import InteractConfig
from tinystory.data.corpus import NO_STORIES
from tinystory.run.credentials import SECRET_NAME, secret_in
from tinystory.run.errors import UserError
from tinystory.teacher.callable import CallableGrader, load_score
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Grader
from tinystory.teacher.prompt import load_template
from tinystory.teacher.rank import Ranked

# Fields of a request that have options of their own or are set by the client.
OWN_FIELDS = {"model", "messages", "stream", "n", "temperature", "seed", "max_tokens"}
OWN_FIELDS |= {"max_completion_tokens", "extra_body", "extra_query"}
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
    builtin_teacher: Callable[[Sequence[str]], AbstractContextManager[str]] | None = None,
    *,
    corpus: Sequence[str] | None,
    replies: Path | None = None,
) -> Iterator[Grader]:
    """Yield the grader that the options describe, ready to use; --teacher-mode rank affects its
    `send` and `collect`. Raises UserError if it cannot be had. builtin_teacher: starts a teacher
    fitted to a corpus and yields its URL; used if no other grader is named. corpus: the student's,
    that teacher's default; None if unknown. replies: cache file of a teacher."""
    load_extra(config.teacher_extra)  # a secret in it is refused whoever grades
    if config.reward:
        with load_score(config.reward, config.teacher_timeout) as score:
            yield CallableGrader(score, config.reward)
    elif config.teacher_url:
        with open_teacher(config, config.teacher_url, replies) as grader:
            yield grader
    else:
        assert builtin_teacher is not None
        with builtin_teacher(builtin_corpus(config, corpus)) as url:
            print(
                f"no --teacher-url: the built-in teacher, a rubric that stands in for an LLM, is at {url}"
            )
            with open_teacher(config, [url], replies) as grader:
                yield grader


def builtin_corpus(config: InteractConfig, corpus: Sequence[str] | None) -> Sequence[str]:
    """What the built-in teacher is fitted to: by default, the stories in the student's corpus."""
    stories = [name for name in corpus or [] if name not in NO_STORIES]
    names = config.teacher_corpus or stories or corpus
    if not names:
        raise UserError(
            f"{config.init} does not say what the student was trained on: give --teacher-corpus NAME|FILE"
        )
    return names


@contextlib.contextmanager
def open_teacher(
    config: InteractConfig, urls: Sequence[str], replies: Path | None
) -> Iterator[Grader]:
    """Yield the teacher at `urls`, once it is probed."""
    teacher = Teacher(
        urls,
        config.teacher_model,
        template=load_template(config.teacher_prompt),
        extra=load_extra(config.teacher_extra),
        seed=config.seed,
        temperature=config.teacher_temperature,
        max_tokens=config.teacher_max_tokens,
        concurrency=config.teacher_concurrency,
        deadline_s=config.teacher_timeout,
        max_unscored=config.max_unscored,
        cache=replies,
        price_in=config.price_in,
        price_out=config.price_out,
        budget_cost=config.budget_cost or None,
    )
    with teacher:
        for probe in teacher.probes():
            print(f"teacher: {probe}")
            for note in probe.notes:
                print(f"warning: {note}")
        if config.teacher_mode == "rank":
            yield Ranked(teacher, config.stories_per_opening)
        else:
            yield teacher


def load_extra(text: str) -> dict[str, Any]:
    """Parse --teacher-extra, a JSON object of request fields whose "extra_headers" are HTTP
    headers. Raises UserError for anything else and, since options are recorded, for what looks like
    a secret at any depth."""
    try:
        fields = json.loads(text or "{}", parse_constant=float, object_pairs_hook=_without_secrets)
        json.dumps(fields, allow_nan=False)
        if not isinstance(fields, dict):
            raise ValueError("this is none")
        taken = sorted(OWN_FIELDS & fields.keys())
        if taken:
            raise ValueError(
                f"it cannot set {taken[0]}, which has an option of its own, or which the client needs"
            )
        headers = fields.get("extra_headers", {})
        if not isinstance(headers, dict) or not all(map(_is_header, headers, headers.values())):
            raise ValueError(
                "its extra_headers must be an object whose values are one line of text each"
            )
    except (ValueError, RecursionError) as error:
        message = (
            f'--teacher-extra must be a JSON object such as \'{{"service_tier": "flex"}}\': {error}'
        )
        raise UserError(message) from None
    return fields


def _without_secrets(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, value in pairs:
        text = json.dumps([name, value])
        if SECRET_NAME.search(name) or SECRET_TEXT.search(text) or secret_in(text):
            in_name = SECRET_TEXT.search(json.dumps(name)) or secret_in(name)
            shown = "a field's name" if in_name else name
            raise ValueError(
                f"it is recorded, so it must hold no secret such as {shown}; use OPENAI_API_KEY"
            )
    return dict(pairs)


def _is_header(name: str, value: object) -> bool:
    if not isinstance(value, str):
        return False
    return bool(re.fullmatch("[A-Za-z0-9-]+", name) and re.fullmatch("[ -~]*", value))
