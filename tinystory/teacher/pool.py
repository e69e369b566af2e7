"""Load balancing, retries and failover over one or several servers of one model."""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from tqdm import tqdm

from tinystory.run.errors import UserError
from tinystory.teacher.api import Failure
from tinystory.teacher.endpoint import Endpoint

T = TypeVar("T")
FAILURES = 8  # failed requests before a story is given up: with the pauses below, a minute or more
# before the first retry, then doubled up to the longest, with jitter
PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
LONGEST_RETRY_AFTER_S = 60.0
PING_S = 10.0  # time limit of the check whether a server is back


@dataclass(frozen=True)
class Answer(Generic[T]):
    value: T
    endpoint: Endpoint  # whose answer it is
    deadline: float  # the story's, on the monotonic clock: for its next request


@dataclass(eq=False)
class ServerPool:
    """While there are more requests than slots, each server takes as many as it answers; otherwise
    a request goes to the one with the fewest in flight. A server that cannot be reached, refuses
    the key or fails FAILURES times in a row is left out while another one is available, and used
    again once it is back."""

    endpoints: Sequence[Endpoint]
    # probes a server, at the start or when it comes up for the first time
    examine: Callable[[Endpoint], Awaitable[None]] | None = None
    probing: bool = False  # for one server: failures are raised to the prober and never end the run

    def __post_init__(self) -> None:
        self.fatal: UserError | None = None  # once set, no further story can be graded
        self._waiting: deque[asyncio.Future[Endpoint]] = deque()  # requests without a slot
        self._returns: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def slot(self, first: bool) -> AsyncIterator[Endpoint]:
        """Wait for a slot and hold it; yields its server. first: skip the queue, for a story that
        held one before."""
        if self.probing:
            yield self.endpoints[0]
            return
        turn: asyncio.Future[Endpoint] = asyncio.get_running_loop().create_future()
        if first:
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        self._admit()
        try:
            yield await turn
        finally:
            if turn.done() and not turn.cancelled():
                turn.result().slots.taken -= 1
                self._admit()

    def _admit(self) -> None:
        """Give free slots to waiting requests."""
        while self._waiting:
            free = [endpoint for endpoint in self.endpoints if endpoint.slots.free]
            if not free:
                return
            turn = self._waiting.popleft()
            if not turn.done():
                endpoint = min(free, key=lambda endpoint: endpoint.slots.taken)
                endpoint.slots.taken += 1
                turn.set_result(endpoint)

    async def ask(
        self,
        request: Callable[[Endpoint], Awaitable[T]],
        deadline: float | None = None,
        exists: bool = True,
    ) -> Answer[T]:
        """Send a request, retrying after transient failures. deadline: the story's, which its first
        request sets. Raises Failure when giving up. exists: whether the server is known to exist;
        if not, getting no answer is not retried."""
        failures = timeouts = 0
        while True:
            async with self.slot(first=deadline is not None) as endpoint:
                if self.fatal is not None:
                    raise self.fatal
                start = time.monotonic()
                if deadline is None:
                    deadline = start + endpoint.options.deadline_s
                timeout = endpoint.slots.timeout(endpoint.options.timeout_s, timeouts)
                timeout = min(timeout, max(deadline - start, 0.0))
                try:
                    value = await asyncio.wait_for(request(endpoint), timeout)
                except asyncio.TimeoutError:  # the builtin TimeoutError only from Python 3.11 on
                    failure = Failure("takes too long to answer", again=True)
                    timeouts += 1
                except Failure as error:
                    failure = error
                else:
                    endpoint.slots.answered(time.monotonic() - start)
                    endpoint.failures = 0
                    endpoint.absences = 0
                    return Answer(value, endpoint, deadline)
                endpoint.ledger.total["failures"] += 1
                if failure.busy:
                    endpoint.slots.refused()
                elif failure.again:
                    endpoint.failures += 1
                if self._is_left_out(endpoint, failure):  # the story is not the cause
                    continue

            failures += 1
            pause = jittered(PAUSE_S * 2 ** (failures - 1))
            pause += min(failure.retry_after or 0.0, LONGEST_RETRY_AFTER_S)
            in_time = time.monotonic() + pause <= deadline
            tries_left = failures < FAILURES or failure.busy
            may_exist = exists or failure.status is not None
            if failure.again and tries_left and may_exist and in_time:
                endpoint.ledger.total["retries"] += 1
                await asyncio.sleep(pause)
            elif (failure.fatal or failure.unreachable) and not self.probing:
                # The story is not the cause: no other one can be graded either.
                self.fatal = UserError(f"the teacher at {endpoint.url} {failure}")
                raise self.fatal
            else:
                raise failure

    async def examine_all(self) -> list[Endpoint]:
        """Examine all servers; returns those that can be used. The unreachable ones are left out
        while another is there. Raises UserError for any other failure, or if none can be
        reached."""
        assert self.examine is not None
        examine = self.examine
        unreachable: dict[Endpoint, Failure] = {}

        async def examine_one(endpoint: Endpoint) -> None:
            try:
                await examine(endpoint)
            except Failure as failure:
                if not failure.unreachable:
                    raise UserError(f"the teacher at {endpoint.url} {failure}") from None
                unreachable[endpoint] = failure

        await asyncio.gather(*map(examine_one, self.endpoints))
        present = [endpoint for endpoint in self.endpoints if endpoint not in unreachable]
        for endpoint, failure in unreachable.items():
            if not present:
                raise UserError(f"the teacher at {endpoint.url} {failure}")
            self.leave_out(endpoint, failure)
        return present

    def leave_out(self, endpoint: Endpoint, failure: Failure) -> None:
        """Use the other servers only, until this one comes back."""
        endpoint.slots.open = False
        tqdm.write(f"warning: the teacher at {endpoint.url} {failure}; the others go on without it")
        if not failure.fatal:
            task = asyncio.create_task(self._await_return(endpoint))
            self._returns.add(task)
            task.add_done_callback(self._returns.discard)

    def _is_left_out(self, endpoint: Endpoint, failure: Failure) -> bool:
        """Leave the server out if the failure calls for it and another is open; returns whether it
        is out."""
        if self.probing:
            return False
        refused = failure.fatal and failure.status is not None
        gone = refused or failure.unreachable or endpoint.failures >= FAILURES
        others = any(other.slots.open for other in self.endpoints if other is not endpoint)
        if gone and others and endpoint.slots.open:
            self.leave_out(endpoint, failure)
        return not endpoint.slots.open

    async def _await_return(self, endpoint: Endpoint) -> None:
        """Wait until the server answers. It restarts with one slot; failing again, it stays out for
        longer."""
        while True:
            await asyncio.sleep(jittered(PAUSE_S * 2**endpoint.absences))
            endpoint.absences = min(endpoint.absences + 1, 9)
            try:
                await asyncio.wait_for(endpoint.client.models(), PING_S)
                break
            except asyncio.TimeoutError:
                pass
            except Failure as failure:
                if not failure.again:  # an answer, though not the one asked for
                    break
        if self.examine is not None and endpoint.probe is None:
            try:
                await self.examine(endpoint)
            except (Failure, UserError) as error:
                tqdm.write(
                    f"warning: the teacher at {endpoint.url} is back, but cannot be used: {error}"
                )
                return
        tqdm.write(f"warning: the teacher at {endpoint.url} is back")
        endpoint.failures = FAILURES - 1
        endpoint.slots.limit = 1.0
        endpoint.slots.open = True
        self._admit()


def jittered(pause: float) -> float:
    return min(pause, LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
