"""Answers: one request per story and yes-or-no question. The question comes last, so that a server
with a prefix cache processes the story once.

The grades of a small model are hardly informative about a text. The probability with which the
model answers yes to one plain question separates some kinds of texts (lab/results/judges.md). The
log-odds are computed from the log-probabilities of the candidates for the first token of the reply.
If a server gives no log-probabilities, the question is asked several times, and the log-odds are
computed from the fraction of yes."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Any

from tinystory.teacher.api import Reply
from tinystory.teacher.grade import LONGEST_REPLY, Grade, Submission
from tinystory.teacher.prompt import FENCED, TOP, chat, fence, user_message
from tinystory.teacher.protocol import Example, Protocol, grammar_constraint, json_constraint

EDITOR = (
    "You are a strict editor of stories for children. A beginner was given an opening, and wrote how the story goes "
    "on."
)
JSON_ANSWER = re.compile(r'\s*\{\s*"answer"\s*:\s*"(yes|no)"\s*\}\s*')
FIRST_WORD = re.compile(r"[\W_]*(yes|no)(?![\w'’-])(?!/|\W+(and|or)\b)", re.IGNORECASE)
# If yes and no together have a lower probability, the reply is not an answer.
LEAST_MASS = 0.1
# Bound on the absolute value of a log-odds; some servers give -9999 for an impossible token.
MOST_ODDS = 20.0
LEAST_PROBABILITY = 1e-12
# Minimum standard deviation of a question's log-odds, so that nearly equal answers do not become
# very different scores.
LEAST_SPREAD = 0.1


def parse_answer(reply: str) -> bool | None:
    """True for a reply whose first word is yes, or the JSON of `YesNo.constraint` with yes; False
    for no; None for any other reply."""
    text = reply[:LONGEST_REPLY]
    answer = JSON_ANSWER.fullmatch(text) or FIRST_WORD.match(text)
    return answer[1].lower() == "yes" if answer else None


@dataclass(frozen=True)
class YesNo(Protocol):
    """Answers to questions, which are criteria without levels. shows_examples: whether the messages
    contain `examples`, which come from the student's corpus. scale: name of a question -> mean and
    standard deviation of the question's log-odds on known texts."""

    preface: str = EDITOR
    shows_examples: bool = False
    examples: tuple[Example, ...] = ()
    # OpenAI and vLLM allow 20. mlx_lm.server closes the connection above 11.
    top_logprobs = 10
    draws = 8
    has_scale = True
    # At 1, log-probabilities before and after the temperature are the same, and the fraction of yes
    # among several answers estimates the probability of yes.
    temperature = 1.0

    def messages(self, opening: str, story: str, mark: str) -> dict[str, list[dict]]:
        """One request per question. The examples are the same for all stories, so a server with a
        prefix cache processes them once."""
        fenced = FENCED.format(judge="judge", pleads="asks for an answer", judged="judged")
        instructions = (
            f"{self.preface} {fenced} Answer the question about the story with one word, yes or no."
        )
        requests = {}
        for criterion in self.criteria:
            end = f"\n\n{criterion.question} Answer yes or no."
            turns = [("system", instructions)]
            for i, example in enumerate(self.examples):
                example_mark = fence(0, i, f"{example.opening}\n{example.story}")
                turns.append(
                    ("user", user_message(example.opening, example.story, example_mark, end))
                )
                is_yes = example.is_good == (criterion.good == "yes")
                turns.append(("assistant", "yes" if is_yes else "no"))
            turns.append(("user", user_message(opening, story, mark, end)))
            requests[criterion.name] = chat(*turns)
        return requests

    def constraint(self, held_to: str) -> dict[str, Any]:
        if held_to == "json":
            return json_constraint({"answer": {"type": "string", "enum": ["yes", "no"]}})
        return grammar_constraint("yes|no", '"yes" | "no"')

    def reads(self, reply: Reply) -> bool:
        return log_odds([reply]) is not None

    def is_bare(self, reply: Reply) -> bool:
        is_json = JSON_ANSWER.fullmatch(reply.text) is not None
        return is_json or letters(reply.text) in ("yes", "no")

    def grade(self, submission: Submission, replies: Mapping[str, Sequence[Reply]]) -> Grade:
        """Scores: TOP times the logistic function of the standardised log-odds of the good answer.
        Without a scale, the log-odds are not standardised, so the score is TOP times the
        probability of the good answer."""
        odds = {}
        scores = {}
        for criterion in self.criteria:
            name = criterion.name
            odds[name] = log_odds(replies[name]) or 0.0
            mean, spread = self.scale.get(name, (0.0, 1.0))
            standardised = (odds[name] - mean) / spread
            if criterion.good == "no":
                standardised = -standardised
            scores[name] = TOP / (1 + math.exp(-standardised))
        return Grade(scores, self.score(scores), log_odds=odds)

    def fitted(self, grades: Sequence[Grade]) -> "YesNo":
        answers = [grade.log_odds for grade in grades if grade.log_odds]
        if not answers:
            return self
        scale = {}
        for name in self.names:
            odds = [answer[name] for answer in answers]
            scale[name] = (fmean(odds), max(pstdev(odds), LEAST_SPREAD))
        return replace(self, scale=scale)

    def restored(self, recorded: object) -> "YesNo | None":
        if not isinstance(recorded, dict) or tuple(recorded) != self.names:
            return None
        scale = {}
        for name, pair in recorded.items():
            match pair:
                case [float(mean), float(spread)] if abs(mean) <= MOST_ODDS >= spread > 0:
                    scale[name] = (mean, spread)
        return replace(self, scale=scale) if len(scale) == len(recorded) else None

    def with_examples(self, examples: Callable[[], Sequence[Example]]) -> "YesNo":
        return replace(self, examples=tuple(examples())) if self.shows_examples else self


def log_odds(replies: Sequence[Reply]) -> float | None:
    """ln p(yes) - ln p(no), from the replies to one question. None if a reply is no answer. If
    log-probabilities were requested, the first reply counts, and by them alone."""
    if replies[0].logprobs is not None:
        return log_odds_of_token(replies[0].logprobs)
    answers = [parse_answer(reply.text) for reply in replies]
    return None if None in answers else log_odds_of_share(answers.count(True), len(answers))


def log_odds_of_token(logprobs: Sequence[tuple[str, float]]) -> float | None:
    """ln p(yes) - ln p(no), at most MOST_ODDS in absolute value; None if both words together have a
    probability below LEAST_MASS, because then the model was about to say something else.

    logprobs: (token, log-probability) pairs that a server lists. The probability of a word is
    summed over all spellings in the list. A word that is not listed is at most as likely as the
    least likely listed token, and as all tokens that are not listed. Its probability is set to this
    upper bound, which makes the log-odds smaller in absolute value."""
    of_word: dict[str, list[float]] = {"yes": [], "no": []}
    for token, logprob in logprobs:
        word = letters(token)
        if word in of_word:
            of_word[word].append(logprob)
    spelled = of_word["yes"] + of_word["no"]
    if not spelled or math.exp(_log_sum(spelled)) < LEAST_MASS:
        return None
    listed = [logprob for _, logprob in logprobs]
    mass_left = max(1 - math.exp(_log_sum(listed)), LEAST_PROBABILITY)
    bound = [min(*listed, math.log(mass_left))]
    odds = _log_sum(of_word["yes"] or bound) - _log_sum(of_word["no"] or bound)
    return min(max(odds, -MOST_ODDS), MOST_ODDS)


def log_odds_of_share(yes: int, count: int) -> float:
    """ln p(yes) - ln p(no), from `yes` answers yes among `count` answers. Half an answer is added
    to yes and to no, so that the log-odds are finite (Haldane 1956)."""
    return math.log(yes + 0.5) - math.log(count - yes + 0.5)


def letters(text: str) -> str:
    """The letters of a text in lower case. Other characters are dropped, because tokenizers mark
    the space before a word in different ways."""
    return re.sub("[^a-z]", "", text.casefold())


def _log_sum(logprobs: Sequence[float]) -> float:
    """The logarithm of the sum of the probabilities."""
    largest = max(logprobs)
    return largest + math.log(math.fsum(math.exp(logprob - largest) for logprob in logprobs))
