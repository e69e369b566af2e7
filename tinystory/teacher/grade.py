"""The grade of one story, and how it is read from a teacher's replies: exactly the scores asked for, or no score.

A reply that is read generously becomes an invented reward ("2 2", cut short, is not 4/9), so three forms are
understood and nothing else is. For the criteria readability, coherence, creativity they are

    2 1 3                                           integers in the order asked, separated by spaces, commas or newlines
    {"readability": 2, "coherence": 1, ...}         one JSON object with exactly these keys, bare or in a ```json fence
    readability: 2, coherence: 1, creativity: 3     exactly these labels
"""

import bisect
import functools
import itertools
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tinystory.run.errors import UserError
from tinystory.teacher.prompt import CRITERIA, TOP, Template, clean

LONGEST_REPLY = 1000  # characters; a longer reply is an essay, and refusing it costs nothing


@dataclass(frozen=True)
class Grade:
    """The outcome of grading one story."""

    # 0..3 per criterion: integers, or expected values from log-probabilities. None if no reply could be read, or if a
    # callable graded the story.
    scores: Mapping[str, float] | None
    score: float | None  # 0..1, of which the reward is made: the weighted mean of `scores` over TOP; None if ungraded
    reply: str = ""  # the last reply, at most LONGEST_REPLY characters
    attempts: int = 0  # replies received; more than one if the first could not be read
    reply_words: int = 0  # whitespace-separated words of all replies, at most max_tokens each: the student's input
    seconds: float = 0.0  # from the first request to the last reply; 0 if no request was made
    error: str | None = None  # why there is no score
    panel: tuple[Mapping[str, float], ...] = ()  # the scores by each teacher of a panel, if all gave some

    @property
    def reply_or_error(self) -> str:
        return self.reply or self.error or ""


def grade_of(
    template: Template,
    scores: Mapping[str, float] | None,
    replies: Sequence[str],
    *,
    max_tokens: int,
    seconds: float = 0.0,
    error: str | None = None,
) -> Grade:
    """The grade that a story's replies make: either the last one holds `scores`, or none does and `error` says why."""
    return Grade(
        scores,
        None if scores is None else template.score(scores),
        replies[-1][:LONGEST_REPLY] if replies else "",
        len(replies),
        # A word is at least one token. If a server ignores max_tokens, nobody reads the words beyond it.
        sum(min(len(reply.split()), max_tokens) for reply in replies),
        seconds,
        error,
    )


def panel_grade(template: Template, models: Sequence[str], grades: Sequence[Grade], how: str) -> Grade:
    """The grade of a panel, one of whose teachers gave each of `grades`: per criterion the mean or the median of their
    scores. Teachers differ in how strict they are, so a story that one of them did not score has no score."""
    scores: dict[str, float] | None = None
    order = sorted(range(len(models)), key=models.__getitem__)  # not that of the URLs: a replay does not know it
    models, grades = [models[i] for i in order], [grades[i] for i in order]
    panel = tuple(grade.scores for grade in grades if grade.scores is not None)
    if len(panel) == len(grades):
        combine = statistics.median if how == "median" else statistics.fmean
        scores = {name: round(float(combine([each[name] for each in panel])), 4) for name in template.names}
    parts = [f"{model}: {grade.reply_or_error}" for model, grade in zip(models, grades, strict=True)]
    return Grade(
        scores,
        None if scores is None else template.score(scores),
        "; ".join(parts)[:LONGEST_REPLY],
        sum(grade.attempts for grade in grades),
        sum(grade.reply_words for grade in grades),
        max(grade.seconds for grade in grades),
        None if scores is not None else "; ".join(grade.error for grade in grades if grade.error),
        panel if scores is not None else (),
    )


def agreement(grades: Sequence[Grade]) -> dict[str, float | None]:
    """How far the teachers of a panel agree, over all pairs of them: panel_agreement, the fraction of scores that are
    equal, and panel_correlation, the mean correlation (Pearson) of the sums of a story's scores, None if it is not
    defined. {} without a panel."""
    panels = [grade.panel for grade in grades if grade.panel]
    if not panels:
        return {}
    pairs = list(itertools.combinations(range(len(panels[0])), 2))
    equal = [panel[a][name] == panel[b][name] for panel in panels for a, b in pairs for name in panel[a]]
    sums = [[sum(panel[at].values()) for panel in panels] for at in range(len(panels[0]))]
    varied = all(len(set(each)) > 1 for each in sums)
    correlations = [statistics.correlation(sums[a], sums[b]) for a, b in pairs] if varied else []
    return {
        "panel_agreement": sum(equal) / len(equal),
        "panel_correlation": sum(correlations) / len(correlations) if correlations else None,
    }


def too_few_scores(grades: Sequence[Grade], max_unscored: float) -> bool:
    return sum(grade.score is None for grade in grades) > max_unscored * len(grades)


def grade_if_empty(template: Template, story: str) -> Grade | None:
    """All 0, by the rubric, for a story without text, which is not sent to the teacher; None for any other story."""
    if clean(story).strip():
        return None
    return Grade(dict.fromkeys(template.names, 0), 0.0)


def require_scores(grades: list[Grade], max_unscored: float) -> None:
    """Raises UserError if more than a fraction `max_unscored` of a step's stories has no score: never a guess."""
    if too_few_scores(grades, max_unscored):
        unscored = [grade for grade in grades if grade.score is None]
        said = dict.fromkeys(repr(grade.reply_or_error[:160]) for grade in unscored)  # each different one once
        replies = "; ".join([*said][:4])
        raise UserError(
            f"{len(unscored)} of {len(grades)} stories got no score, more than --max-unscored {max_unscored:g} allows; "
            f"all earlier steps are saved, so fix the teacher and go on with --resume (it said {replies})"
        )


def score_means(grades: list[Grade]) -> dict[str, float | None]:
    """score_mean: the sum of the criteria's scores, 0..9, as the paper plots it (or a callable's score, 0..1), with its
    standard deviation score_std, None of one story; and the mean of each criterion. The paper's three criteria are
    always there, None if others are graded."""
    scored = [g for g in grades if g.score is not None]
    names = dict.fromkeys([*CRITERIA, *(name for g in scored for name in g.scores or ())])
    values = {f"{name}_mean": [g.scores[name] for g in scored if g.scores and name in g.scores] for name in names}
    values["score_mean"] = [sum(g.scores.values()) if g.scores else g.score for g in grades if g.score is not None]
    means = {name: sum(each) / len(each) if each else None for name, each in values.items()}
    return means | {"score_std": statistics.stdev(values["score_mean"]) if len(values["score_mean"]) > 1 else None}


_SPACE = r"[ \t\r\n]"
_BETWEEN = rf"(?:{_SPACE}+(?:,{_SPACE}*)?|,{_SPACE}*)"
_DIGIT = rf"[0-{TOP}]"  # a class, not \d, which also means the digits of other scripts
_FENCED = re.compile(rf"```(?:json)?{_SPACE}*(\{{.*\}}){_SPACE}*```", re.DOTALL)


def parse_scores(reply: str, criteria: Sequence[str]) -> dict[str, int] | None:
    """The score, 0..3, of each criterion, in the order of `criteria`; None if the reply is not exactly one of the three
    forms."""
    if len(reply) > LONGEST_REPLY:
        return None
    text = reply.strip(" \t\r\n")
    numbers, labelled = _patterns(tuple(criteria))
    found: list[tuple[str, object]]
    if match := numbers.fullmatch(text):
        found = list(zip(criteria, map(int, match.groups()), strict=True))
    elif match := labelled.fullmatch(text):
        names, digits = match.groups()[0::2], match.groups()[1::2]
        found = list(zip(names, map(int, digits), strict=True))
    else:
        found = _json_object(text)
    scores = {name: value for name, value in found if type(value) is int and 0 <= value <= TOP}  # True is no score
    if len(found) != len(criteria) or scores.keys() != set(criteria):
        return None
    return {name: scores[name] for name in criteria}


def expected_scores(
    reply: str, criteria: Sequence[str], tokens: Sequence[tuple[str, Mapping[str, float]]]
) -> dict[str, float] | None:
    """The expected value of each score in a reply: the mean of 0..3 under the probabilities of these digits at the
    score's position, normalised to sum to 1 (G-Eval, arXiv 2303.16634, equation 1), rounded to 4 decimals.

    tokens: those of the reply, each with the natural log-probabilities of the candidates at its position. None if the
    reply holds no scores, or if the tokens do not spell the reply, or if no candidate is a digit alone.
    """
    scores = parse_scores(reply, criteria)
    spelled = "".join(token for token, _ in tokens)
    # A server may strip the reply, send thoughts before it, or add the end-of-turn token to the tokens.
    start = spelled.rfind(reply)
    if scores is None or start < 0:
        return None
    begins = [0, *itertools.accumulate(len(token) for token, _ in tokens)]
    expected = {}
    for name, at in _digit_positions(reply, criteria).items():
        token, candidates = tokens[bisect.bisect_right(begins, start + at) - 1]
        probabilities = [0.0] * (TOP + 1)
        for candidate, logprob in candidates.items():
            if re.fullmatch(_DIGIT, candidate.strip()):  # " 2" is 2
                probabilities[int(candidate)] += math.exp(logprob)
        if token.strip() != reply[at] or not any(probabilities):
            return None
        expected[name] = round(sum(score * p for score, p in enumerate(probabilities)) / sum(probabilities), 4)
    return expected if expected.keys() == scores.keys() else None


def _digit_positions(reply: str, criteria: Sequence[str]) -> dict[str, int]:
    """The index of each criterion's digit in a reply that holds scores."""
    if numbers := _patterns(tuple(criteria))[0].fullmatch(reply.strip(" \t\r\n")):
        before = len(reply) - len(reply.lstrip(" \t\r\n"))
        return {name: before + numbers.start(i) for i, name in enumerate(criteria, start=1)}
    found = ((name, re.search(rf'\b{name}"?{_SPACE}*:{_SPACE}*({_DIGIT})', reply)) for name in criteria)
    return {name: match.start(1) for name, match in found if match}  # a key may be written with \u escapes


@functools.cache
def _patterns(criteria: tuple[str, ...]) -> tuple[re.Pattern, re.Pattern]:
    numbers = _BETWEEN.join([f"({_DIGIT})"] * len(criteria))
    label = "|".join(map(re.escape, criteria))
    labelled = _BETWEEN.join([rf"({label}){_SPACE}*:{_SPACE}*({_DIGIT})"] * len(criteria))
    return re.compile(numbers + r"\.?"), re.compile(labelled + r"\.?")


def _json_object(text: str) -> list[tuple[str, object]]:
    """The (key, value) pairs of a flat JSON object, with repeated keys so that they can be refused; [] for any other
    text."""
    if match := _FENCED.fullmatch(text):
        text = match[1]
    if not text.startswith("{") or text.count("{") != 1:
        return []
    try:
        return json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):  # not JSON, or JSON nested too deeply
        return []
