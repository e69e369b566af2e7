"""Log-odds of yes: ln p(yes) - ln p(no), from the log-probabilities of a reply's first token."""

import math
import re
from collections.abc import Sequence

# If yes and no together have a lower probability, the reply is not an answer.
LEAST_MASS = 0.1
# Bound on the absolute value of a log-odds; some servers give -9999 for an impossible token.
MOST_ODDS = 20.0
LEAST_PROBABILITY = 1e-12


def log_odds(alternatives: Sequence[tuple[str, float]]) -> float | None:
    """ln p(yes) - ln p(no), at most MOST_ODDS in absolute value; None if both words together have a
    probability below LEAST_MASS, because then the model was about to say something else.

    alternatives: (token, log-probability) pairs that a server lists. The probability of a word is
    summed over all spellings in the list. A word that is not listed is at most as likely as the
    least likely listed token, and as all tokens that are not listed. Its probability is set to this
    upper bound, which makes the log-odds smaller in absolute value."""
    logprobs: dict[str, list[float]] = {"yes": [], "no": []}
    for token, logprob in alternatives:
        word = letters(token)
        if word in logprobs:
            logprobs[word].append(logprob)
    spelled = logprobs["yes"] + logprobs["no"]
    if not spelled or math.exp(_log_sum(spelled)) < LEAST_MASS:
        return None
    listed = [logprob for _, logprob in alternatives]
    mass_left = max(1 - math.exp(_log_sum(listed)), LEAST_PROBABILITY)
    bound = [min(*listed, math.log(mass_left))]
    odds = _log_sum(logprobs["yes"] or bound) - _log_sum(logprobs["no"] or bound)
    return min(max(odds, -MOST_ODDS), MOST_ODDS)


def odds_of_share(answers: Sequence[bool]) -> float:
    """Log-odds of yes from several answers to one question. Half an answer is added to yes and to
    no, so that the log-odds are finite (Haldane 1956)."""
    count = sum(answers)
    return math.log(count + 0.5) - math.log(len(answers) - count + 0.5)


def letters(text: str) -> str:
    """The letters of a text in lower case. Other characters are dropped, because tokenizers mark
    the space before a word in different ways."""
    return re.sub("[^a-z]", "", text.casefold())


def _log_sum(logprobs: Sequence[float]) -> float:
    """The logarithm of the sum of the probabilities."""
    largest = max(logprobs)
    return largest + math.log(math.fsum(math.exp(logprob - largest) for logprob in logprobs))
