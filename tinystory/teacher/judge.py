"""One model behind one or several servers: who is asked next, what is asked again, and who is left out for a while."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from tinystory.run.errors import UserError
from tinystory.teacher.api import Failure
from tinystory.teacher.endpoint import Endpoint
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.slots import Queue, Slots

T = TypeVar("T")
FAILURES = 8  # failed requests after which a story is given up; with the pauses below, after a minute or more
PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # before the first retry, and before any; doubled each time, with jitter
LONGEST_RETRY_AFTER_S = 60.0
PING_S = 10.0  # seconds that a server which was away has to answer


@dataclass
class Question:
    """A story being graded: the messages, the fence in them, and when its first request was sent."""

    messages: list[dict]
    fence: str
    afresh: bool = False  # whether replies that an earlier process kept are of no use
    since: float | None = None


@dataclass
class Terms:
    """What all judges of a teacher share. A story's requests end within `deadline_s` seconds, and each within
    deadline_s / attempts."""

    deadline_s: float
    attempts: int
    ledger: Ledger
    news: list[str] = field(default_factory=list)  # what the user should be told
    fatal: UserError | None = None  # set once no further story can be graded


class Judge:
    """`endpoints` serve the same model. A server that cannot be reached, refuses the key or fails FAILURES times in a
    row is left out as long as another one is there; one that may come back is asked again when it does.

    wake: examines a server that comes up for the first time. probing: one server is asked what it can do; a failure is
    the caller's to judge and never ends the run.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        terms: Terms,
        wake: Callable[[Endpoint], Awaitable[None]] | None = None,
        probing: bool = False,
    ):
        self.endpoints, self.terms, self.wake, self.probing = endpoints, terms, wake, probing
        self.queue = Queue([Slots(1) if probing else endpoint.slots for endpoint in endpoints])
        self._away: set[asyncio.Task[None]] = set()

    async def ask(self, request: Callable[[Endpoint], Awaitable[T]], question: Question, reached: bool = True) -> T:
        """The result of `request`, retried after transient failures; raises Failure when it is given up.

        Each request waits for a free slot, and a story that pauses holds none. reached: whether the server is known to
        exist; if not, one that gives no answer is given up at once.
        """
        terms, failures, timeouts = self.terms, 0, 0
        while True:
            async with self.queue.one(first=question.since is not None) as at:
                endpoint = self.endpoints[at]
                if terms.fatal is not None and not self.probing:
                    raise terms.fatal
                began = time.monotonic()
                if question.since is None:
                    question.since = began
                left = max(question.since + terms.deadline_s - began, 0.0)
                try:
                    timeout = endpoint.slots.timeout(terms.deadline_s / terms.attempts, timeouts)
                    answer = await asyncio.wait_for(request(endpoint), min(left, timeout))
                    endpoint.slots.answered(time.monotonic() - began)
                    endpoint.failed = endpoint.absences = 0
                    return answer
                except asyncio.TimeoutError:  # the builtin TimeoutError only from Python 3.11 on
                    failure = Failure("takes too long to answer", again=True)
                    timeouts += 1
                except Failure as error:
                    failure = error
                terms.ledger.count("failures", server=endpoint.url)
                endpoint.failed += failure.again and not failure.busy
                if failure.busy:
                    endpoint.slots.refused()
                if self._left_out(endpoint, failure):  # the story is not the cause
                    continue
            failures += 1
            if failure.fatal:
                self._stop(endpoint, failure)
            pause = jittered(PAUSE_S * 2 ** (failures - 1))
            if failure.retry_after is not None:
                pause += min(failure.retry_after, LONGEST_RETRY_AFTER_S)
            late = time.monotonic() + pause > question.since + terms.deadline_s
            if failure.again and not late and (failures < FAILURES or failure.busy) and (reached or failure.status):
                terms.ledger.count("retries")
                await asyncio.sleep(pause)
                continue
            if failure.unreachable:  # after all retries, so the story is not the cause
                self._stop(endpoint, failure)
            raise failure

    def leave_out(self, endpoint: Endpoint, failure: Failure) -> None:
        """Ask the other servers from now on; look after this one if it may come back."""
        endpoint.slots.open = False
        self.terms.news.append(f"the teacher at {endpoint.url} {failure}; the others go on without it")
        if not failure.fatal:
            task = asyncio.create_task(self._look_after(endpoint))
            self._away.add(task)
            task.add_done_callback(self._away.discard)

    def _left_out(self, endpoint: Endpoint, failure: Failure) -> bool:
        """Whether others go on without the server."""
        if self.probing:
            return False
        if not endpoint.slots.open:  # another request has found out
            return True
        gone = (failure.fatal and failure.status) or failure.unreachable or endpoint.failed >= FAILURES
        if not gone or not any(each.slots.open for each in self.endpoints if each is not endpoint):
            return False
        self.leave_out(endpoint, failure)
        return True

    async def _look_after(self, endpoint: Endpoint) -> None:
        """Until the server answers again, whatever it says of its models. Then it gets one request at a time, and is
        left out for longer if the first one fails."""
        while True:
            await asyncio.sleep(jittered(PAUSE_S * 2**endpoint.absences))
            endpoint.absences = min(endpoint.absences + 1, 9)
            try:
                await asyncio.wait_for(endpoint.server.models(), PING_S)
            except asyncio.TimeoutError:
                continue
            except Failure as failure:
                if failure.again:
                    continue
            try:
                if self.wake is not None and endpoint.probed is None:
                    await self.wake(endpoint)
            except (Failure, UserError) as error:
                self.terms.news.append(f"the teacher at {endpoint.url} is back, but cannot be used: {error}")
                return
            self.terms.news.append(f"the teacher at {endpoint.url} is back")
            endpoint.failed = FAILURES - 1
            endpoint.slots.reopen()
            self.queue.admit()
            return

    def _stop(self, endpoint: Endpoint, failure: Failure) -> NoReturn:
        if self.probing:
            raise failure
        self.terms.fatal = UserError(f"the teacher at {endpoint.url} {failure}")
        raise self.terms.fatal


def jittered(pause: float) -> float:
    return min(pause, LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
