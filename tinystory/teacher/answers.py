"""Answers to questions of yes or no: from a reply to a log-odds, and from log-odds to scores.

A small model's grades say little about a text, while the probability with which it says yes to one
plain question orders texts well (docs/teachers.md, "Which model can judge"). The log-odds come from
the log-probabilities of the tokens among which the model chose the first one of its reply. Where a
server gives none, the question is asked several times, and the log-odds come from the share of
yes."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

from tinystory.teacher.parse import LONGEST_REPLY
from tinystory.teacher.prompt import TOP

LEAST_MASS = 0.1  # probability of yes and no together, below which a reply was no answer
MOST_ODDS = 20.0  # bound on a log-odds; some servers give -9999 for an impossible token
LEAST_SPREAD = 0.1  # of a question's log-odds, so that equal answers do not become far apart

YES_OR_NO = {"yes": True, "no": False}


def parse_answer(reply: str) -> bool | None:
    """Whether a reply is yes, in any case and with any punctuation. None if it is neither yes nor
    no."""
    return YES_OR_NO.get(_word(reply[:LONGEST_REPLY]))


def log_odds(alternatives: Sequence[tuple[str, float]]) -> float | None:
    """ln p(yes) - ln p(no), within MOST_ODDS. Each is summed over its spellings among the (token,
    log-probability) pairs that a server lists. A word that is not listed is at most as likely as the
    least likely token that is, and is taken to be as likely, which understates the odds. None if
    both words together have a probability below LEAST_MASS: the model was about to say something
    else."""
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
    """The log-odds of yes after these answers to one question, with half an answer added to each
    side, so that they are finite (Haldane 1956)."""
    count = sum(answers)
    return math.log(count + 0.5) - math.log(len(answers) - count + 0.5)


@dataclass
class AnswerScale:
    """Scores from log-odds. questions: by a question's name, the mean and the standard deviation of
    its log-odds on known texts; empty before they are measured."""

    questions: dict[str, tuple[float, float]] = field(default_factory=dict)

    def fit(self, log_odds: Sequence[Mapping[str, float]]) -> None:
        """Measure the questions by their log-odds on known texts, one mapping per text."""
        for name in log_odds[0]:
            values = [odds[name] for odds in log_odds]
            self.questions[name] = (fmean(values), max(pstdev(values), LEAST_SPREAD))

    def score(self, name: str, odds: float) -> float:
        """0..TOP: TOP times the logistic function of the standardised log-odds; of the log-odds
        themselves, which gives the probability of yes, if the question was not measured."""
        mean, spread = self.questions.get(name, (0.0, 1.0))
        return TOP / (1 + math.exp(-(odds - mean) / spread))


def _word(text: str) -> str:
    """Its letters in lower case: tokenizers mark the space before a word in several ways."""
    return re.sub("[^a-z]", "", text.casefold())


def _log_sum(logprobs: Sequence[float]) -> float:
    largest = max(logprobs)
    return largest + math.log(math.fsum(math.exp(logprob - largest) for logprob in logprobs))
