"""The cost of grading: requests, tokens and money. No request can exceed the budget."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tinystory.teacher.api import Failure


class Ledger:
    """Counter of requests, tokens and cost, with a budget. Prices are per million tokens, in the
    currency of `budget` (0: unlimited). A request first reserves the maximum cost. It is then
    charged the cost that the server reports, or the maximum cost if no answer comes. Requests in
    flight when a process is killed are not counted. charged: the value of `charged` at the end of
    the run's earlier processes."""

    def __init__(
        self, price_in: float, price_out: float, budget: float, charged: tuple[int, int, int]
    ):
        self.price_in = price_in
        self.price_out = price_out
        self.budget = budget
        self.largest_in = charged[2]  # upper bound on the tokens of the longest prompt so far
        # Keys: tokens_in and tokens_out (reported by the server, or else reserved), requests,
        # retries, cached.
        self.total = Counter(tokens_in=charged[0], tokens_out=charged[1])
        self._in_flight: Counter[str] = Counter()  # the reserved part of `total`
        self._before = self.total.copy()  # `total` at the last `stats`

    def price(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    @property
    def cost(self) -> float:
        return self.price(self.total["tokens_in"], self.total["tokens_out"])

    @property
    def charged(self) -> tuple[int, int, int]:
        """Prompt tokens and reply tokens charged, without requests in flight, and `largest_in`. A
        resumed run starts with these values, so that the budget ends at the same step."""
        settled = self.total - self._in_flight
        return settled["tokens_in"], settled["tokens_out"], self.largest_in

    def affords(self, tokens_in: int, tokens_out: int) -> bool:
        """Whether these tokens, in addition to the charged and reserved ones, stay within the
        budget."""
        if not self.budget:
            return True
        tokens_in += self.total["tokens_in"]
        tokens_out += self.total["tokens_out"]
        return self.price(tokens_in, tokens_out) <= self.budget

    @contextmanager
    def request(self, tokens_in: int, tokens_out: int) -> Iterator[dict[str, int]]:
        """Yields the charge of a request, after reserving the tokens. The sender updates the charge
        with the server's counts. Raises Failure if the request could exceed the budget."""
        self.largest_in = max(self.largest_in, tokens_in)
        if not self.affords(tokens_in, tokens_out):
            raise Failure(
                f"cannot be asked again within --budget-cost {self.budget:g} ({self.cost:.4f} is spent): "
                "raise --budget-cost and continue with --resume",
                fatal=True,
            )
        reserved = dict(tokens_in=tokens_in, tokens_out=tokens_out)
        self.total.update(reserved, requests=1)
        self._in_flight.update(reserved)
        charge = reserved.copy()
        try:
            yield charge
        except Failure as failure:
            # the server has not processed the request, so it bills nothing
            if failure.unreachable or failure.status not in (None, 200):
                charge = {}
            raise
        finally:
            self.total.update(charge)
            self.total.subtract(reserved)
            self._in_flight.subtract(reserved)

    def stats(self) -> dict[str, Any]:
        """Metrics: requests, retries, cached, tokens_in and tokens_out since the last call, and the
        cost of the whole run."""
        names = ("requests", "retries", "cached", "tokens_in", "tokens_out")
        stats: dict[str, Any] = {name: self.total[name] - self._before[name] for name in names}
        self._before = self.total.copy()
        return stats | {"cost": self.cost}
