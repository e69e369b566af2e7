"""Answers to yes-or-no questions: log-odds from replies, and scores from log-odds.

The grades of a small model are hardly informative about a text. The probability with which the
model answers yes to one plain question ranks texts well (docs/teachers.md, "Which model can
judge"). The log-odds are computed from the log-probabilities of the candidates for the first token
of the reply. If a server gives no log-probabilities, the question is asked several times, and the
log-odds are computed from the fraction of yes."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

from tinystory.teacher.parse import LONGEST_REPLY
from tinystory.teacher.prompt import TOP

# If yes and no together have a lower probability, the reply is not an answer.
LEAST_MASS = 0.1
# Bound on the absolute value of a log-odds; some servers give -9999 for an impossible token.
MOST_ODDS = 20.0
# Minimum standard deviation of a question's log-odds, so that nearly equal answers do not become
# very different scores.
LEAST_SPREAD = 0.1

YES_OR_NO = {"yes": True, "no": False}


def parse_answer(reply: str) -> bool | None:
    """True for a reply "yes", False for a reply "no", in upper or lower case and with any
    punctuation; None for any other reply."""
    return YES_OR_NO.get(_word(reply[:LONGEST_REPLY]))


def log_odds(alternatives: Sequence[tuple[str, float]]) -> float | None:
    """ln p(yes) - ln p(no), at most MOST_ODDS in absolute value; None if both words together have a
    probability below LEAST_MASS, because then the model was about to say something else.

    alternatives: (token, log-probability) pairs that a server lists. The probability of a word is
    summed over all spellings in the list. A word that is not listed is at most as likely as the
    least likely listed token. Its probability is set to this upper bound, which makes the log-odds
    smaller in absolute value."""
    logprobs: dict[str, list[float]] = {word: [] for word in YES_OR_NO}
    for token, logprob in alternatives:
        word = _word(token)
        if word in logprobs:
            logprobs[word].append(logprob)
    spelled = logprobs["yes"] + logprobs["no"]
    if not spelled or math.exp(_log_sum(spelled)) < LEAST_MASS:
        return None
    least_likely = [min(logprob for _, logprob in alternatives)]
    odds = _log_sum(logprobs["yes"] or least_likely) - _log_sum(logprobs["no"] or least_likely)
    return min(max(odds, -MOST_ODDS), MOST_ODDS)


def odds_of_share(answers: Sequence[bool]) -> float:
    """Log-odds of yes from several answers to one question. Half an answer is added to yes and to
    no, so that the log-odds are finite (Haldane 1956)."""
    count = sum(answers)
    return math.log(count + 0.5) - math.log(len(answers) - count + 0.5)


@dataclass
class AnswerScale:
    """Scale from log-odds to scores. questions: name of a question -> mean and standard deviation
    of the question's log-odds on known texts; empty before `fit`."""

    questions: dict[str, tuple[float, float]] = field(default_factory=dict)

    def fit(self, log_odds: Sequence[Mapping[str, float]]) -> None:
        """Fit the scale of each question. log_odds: one mapping per known text, from the name of a
        question to the log-odds."""
        for name in log_odds[0]:
            values = [odds[name] for odds in log_odds]
            self.questions[name] = (fmean(values), max(pstdev(values), LEAST_SPREAD))

    def score(self, name: str, odds: float) -> float:
        """Score in 0..TOP: TOP times the logistic function of the standardised log-odds. Before
        `fit`, the log-odds are not standardised, so the score is TOP times the probability of
        yes."""
        mean, spread = self.questions.get(name, (0.0, 1.0))
        return TOP / (1 + math.exp(-(odds - mean) / spread))


def _word(text: str) -> str:
    """The letters of a text in lower case. Other characters are dropped, because tokenizers mark
    the space before a word in different ways."""
    return re.sub("[^a-z]", "", text.casefold())


def _log_sum(logprobs: Sequence[float]) -> float:
    """The logarithm of the sum of the probabilities."""
    largest = max(logprobs)
    return largest + math.log(math.fsum(math.exp(logprob - largest) for logprob in logprobs))
