"""Opens the grader that the options describe: a teacher over HTTP, or a callable."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tinystory.config import InteractConfig
from tinystory.data import babylm
from tinystory.data.corpus import open_corpus, story_corpora
from tinystory.run.credentials import SECRET_NAME, secret_in
from tinystory.run.errors import UserError
from tinystory.run.options import is_url
from tinystory.run.records import NO_FIELDS, parse_object
from tinystory.teacher.builtin import builtin_teacher
from tinystory.teacher.callable import CONTROLS, CallableGrader, load_score
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Grader
from tinystory.teacher.named_protocols import load_protocol
from tinystory.teacher.protocol import Example

# Fields of a request that --teacher-extra must not set: other options or the client set them.
OWN_FIELDS = {"model", "messages", "stream", "n", "temperature", "seed", "max_tokens"}
OWN_FIELDS |= {"max_completion_tokens", "extra_body", "extra_headers", "extra_query"}
FIELD_NAME = re.compile(r'"((?:[^"\\]|\\.)*)":')  # in JSON
# Prefixes of API keys. SECRET_TEXT finds them at the beginning of a JSON string, and at the
# beginning of a long word within a string.
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
    role: str = "teacher",
) -> Iterator[Grader]:
    """Yields the grader that the options describe, ready to use. Raises UserError if the grader
    cannot be opened. corpus: names of the corpora to which the built-in teacher is fitted; it is
    used if the options name no grader. replies: cache file of a teacher. likelihood: constructs the
    grader of --reward likelihood. examples: returns the worked examples for a --teacher-prompt that
    shows examples. role: "teacher" or "judge", for messages."""
    extra = load_extra(config.teacher_extra)  # a secret in it is an error with every grader
    if config.reward == "likelihood" and likelihood:
        yield likelihood()
    elif config.reward:
        if config.preset in babylm.TRACKS and config.reward not in CONTROLS:
            print(
                f"warning: BabyLM (--preset {config.preset}) does not allow a model's probabilities to reach the "
                f"student: --reward {config.reward} must not compute its scores from them"
            )
        with load_score(config.reward, config.teacher_timeout) as score:
            yield CallableGrader(score, config.reward)
    else:
        with contextlib.ExitStack() as stack:
            urls = config.teacher_url
            if not urls:
                assert corpus
                urls = [stack.enter_context(fitted_rubric(corpus))]
                print(
                    f"no --teacher-url: the built-in teacher, a rubric that stands in for an LLM, is at {urls[0]}"
                )
            prompt_flag = f"--{role}-prompt"
            protocol = load_protocol(config.teacher_prompt, prompt_flag)
            if protocol.top_logprobs and config.preset in babylm.TRACKS:
                raise UserError(
                    f"{prompt_flag} {config.teacher_prompt} asks yes-or-no questions and reads probabilities from "
                    f"the answers, but BabyLM (--preset {config.preset}) does not allow a model's probabilities "
                    f"to reach the student: use a {prompt_flag} that asks for grades"
                )
            for name, flag in config.changed_options().items():
                is_for_grades = name in ("teacher_temperature", "teacher_max_tokens")
                if is_for_grades and protocol.top_logprobs:
                    raise UserError(
                        f"{flag} has no effect with --teacher-prompt {config.teacher_prompt}, which "
                        f"asks yes-or-no questions: leave {flag} out"
                    )
            if examples:
                protocol = protocol.with_examples(examples)
            teacher = Teacher(
                urls,
                config.teacher_model,
                role=role,
                protocol=protocol,
                extra=extra,
                seed=config.seed,
                temperature=config.teacher_temperature,
                max_tokens=config.teacher_max_tokens,
                concurrency=config.teacher_concurrency,
                deadline_s=config.teacher_timeout,
                per_minute=config.teacher_per_minute,
                any_model=config.any_model,
                max_unscored=config.max_unscored,
                cache=replies,
                price_in=config.price_in,
                price_out=config.price_out,
                budget_cost=config.budget_cost,
            )
            stack.enter_context(teacher)
            if config.teacher_url:  # how to ask the built-in teacher is known
                for probe in teacher.probes:
                    print(f"{role}: {probe}")
            yield teacher


def fitted_rubric(corpus: Sequence[str]) -> contextlib.AbstractContextManager[str]:
    """The built-in teacher, fitted to the stories of these corpora. Raises UserError if there is no
    such corpus."""
    open_corpus(corpus)  # so that a wrong name is an error of this process, not of the server's
    return builtin_teacher(story_corpora(corpus))


@contextlib.contextmanager
def open_judge(
    config: InteractConfig,
    *,
    corpus: Sequence[str],
    replies: Path | None = None,
    examples: Callable[[], Sequence[Example]] | None = None,
) -> Iterator[Grader]:
    """Yields the second judge, the grader that --judge names. Raises UserError if the judge cannot
    be opened. The arguments are those of `open_grader`."""
    judge = config.judge
    options = InteractConfig(
        preset=config.preset,
        seed=config.seed,
        teacher_model=[config.judge_model] if config.judge_model else [],
        teacher_prompt=config.judge_prompt,
        teacher_concurrency=config.teacher_concurrency,
        teacher_timeout=config.teacher_timeout,
        teacher_per_minute=config.teacher_per_minute,
        any_model=config.any_model,
    )
    with contextlib.ExitStack() as stack:
        print(f"second judge: {judge}")
        if is_url(judge):
            options.teacher_url = [judge]
        elif judge == "rubric":
            options.teacher_url = [stack.enter_context(fitted_rubric(corpus))]
        else:
            score = stack.enter_context(load_score(judge, config.teacher_timeout, "--judge"))
            yield CallableGrader(score, judge)
            return
        yield stack.enter_context(
            open_grader(options, corpus=corpus, replies=replies, examples=examples, role="judge")
        )


def load_extra(text: str) -> dict[str, Any]:
    """The request fields in --teacher-extra, a JSON object. Raises UserError if it is not a JSON
    object, and if any part looks like a secret, because options are recorded."""
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
            f"--teacher-extra cannot set {taken[0]}, because another option or the client sets this field: remove "
            f"{taken[0]} (for headers, set OPENAI_CUSTOM_HEADERS)"
        )
    forms = f"{text} {json.dumps(fields)}"  # the text as it is recorded, and without escapes
    names_a_secret = any(map(SECRET_NAME.search, FIELD_NAME.findall(forms)))
    if names_a_secret or SECRET_TEXT.search(forms) or secret_in(forms):
        raise UserError(
            "--teacher-extra is recorded, so it must hold no secret: set OPENAI_API_KEY or OPENAI_CUSTOM_HEADERS "
            "instead"
        )
    return fields
