"""Asking the teacher: any server that speaks OpenAI's chat completions, and nothing lost when it misbehaves.

One event loop in a thread of its own sends the stories, so they can be judged while others are still being written.
Every story ends with scores that the teacher gave, or with none; no failure ever becomes a number.
"""

import asyncio
import concurrent.futures
import itertools
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import urlsplit

from tinystory.errors import UserError
from tinystory.teacher.api import Failure, Server
from tinystory.teacher.cache import Cache, cache_key
from tinystory.teacher.prompt import CRITERIA, clean, fence, render
from tinystory.teacher.score import LONGEST_REPLY, parse_scores

FAILURES = 8  # failed requests after which a story is given up; with the pauses below, a minute or more
PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # before the first and the latest of them; jittered, doubled each time
LONGEST_RETRY_AFTER_S = 60.0


@dataclass(frozen=True)
class Judgement:
    """What came of one story."""

    scores: dict[str, int] | None  # 0..3 by criterion; None where the teacher gave none that could be read
    reply: str  # the last reply, at most LONGEST_REPLY characters
    attempts: int  # replies received; more than one where the first could not be read
    reply_words: int  # their white-space separated words, which count as the student's input; max_tokens at most each
    seconds: float  # from the first request to the last reply, 0 where no request was made
    error: str | None  # why there are no scores


@dataclass
class _Question:
    """A story on its way: the messages, the mark in them, and when its first request was sent."""

    messages: list[dict]
    mark: str
    since: float | None = None


class Teacher:
    """A teacher behind `url`, asked by at most `concurrency` requests at a time.

    A story's requests all end within `deadline_s` seconds of its first; each is given a fair part of that. A reply
    that holds no scores is asked for again with another seed, `attempts` times at most. `cache` is the path of a file
    that keeps every reply (see cache.py). The key is OPENAI_API_KEY; servers of one's own need none.

    What asking again cannot mend (a refused key, an exhausted quota, an unknown model, a story too long for the
    model's context) raises UserError from whatever waits for a judgement, and stops the stories still to be asked.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        concurrency: int = 16,
        temperature: float = 0.2,
        seed: int = 0,
        max_tokens: int = 16,
        deadline_s: float = 300.0,
        attempts: int = 3,
        cache: str | os.PathLike | None = None,
        api_key: str | None = None,
    ):
        self.url = _base_url(url)
        self.model = model
        self.temperature, self.seed, self.max_tokens = temperature, seed, max_tokens
        self.deadline_s, self.attempts = deadline_s, attempts
        self.counts = Counter()  # requests, failures (of requests), cached (replies)
        self._token_cap = "max_tokens"
        self._probed: dict | None = None
        self._fatal: UserError | None = None
        self._server = Server(self.url, api_key or os.environ.get("OPENAI_API_KEY"), deadline_s / attempts)
        self._cache = None if cache is None else Cache(cache)
        self._slots = _Slots(concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
        self._thread.start()

    def probe(self) -> dict:
        """Ask the server what it is, once: {"url", "model", "token_cap", "reply", "scored"}.

        The model (the first that it lists, if none was named), the name that it has for the token cap, its reply to a
        first story, and whether that held scores. UserError where the server is not there, is no OpenAI-compatible
        API, does not list the model, or refuses.
        """
        if self._probed is None:
            self._probed = self._run(self._probe()).result()
        return self._probed

    def submit(self, opening: str, story: str, index: int) -> "concurrent.futures.Future[Judgement]":
        """Send one story to be judged, after `probe`; `index`, its number in the run, makes its mark.

        A story with no text at all is 0 0 0 by the rubric and is not sent.
        """
        self.probe()
        return self._run(self._judge(opening, story, index))

    def judge(
        self,
        opening: str,
        stories: Sequence[str],
        first_index: int,
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[Judgement]:
        """The judgements of `stories`, in their order; `progress(1)` is called as each one comes."""
        futures = [self.submit(opening, story, first_index + i) for i, story in enumerate(stories)]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                progress(1)
        finally:  # an error or Ctrl-C: nothing stays on its way
            for future in futures:
                future.cancel()
        return [future.result() for future in futures]

    def close(self) -> None:
        """Cancel what is on its way, and close the connections and the cache."""
        if self._loop.is_closed():
            return
        self._run(self._shut()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._cache is not None:
            self._cache.close()

    def __enter__(self) -> "Teacher":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # Everything below runs on the event loop's thread.

    def _run(self, coroutine: Awaitable) -> concurrent.futures.Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _shut(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.close()

    async def _probe(self) -> dict:
        try:
            models = await self._patiently(self._server.models, _Question([], ""), reached=False)
            if self.model is None:
                if not models:
                    raise UserError(f"the teacher at {self.url} lists no model: load one, or name it")
                self.model = models[0]
            elif self.model not in models:
                listed = self._server.words(", ".join(models)) or "none"
                raise UserError(f"the teacher at {self.url} has no model {self.model!r}; it lists: {listed}")
            opening, story = "Once upon a time,", "a cat sat down by the fire and slept."
            mark = fence(self.seed, -1, opening + story)
            question = _Question(render(opening, story, fence=mark), mark)
            try:
                reply = await self._patiently(lambda: self._ask(question, 0), question)
            except Failure as failure:
                if failure.status != 400 or "max_completion_tokens" not in str(failure):
                    raise
                self._token_cap = "max_completion_tokens"
                reply = await self._patiently(lambda: self._ask(question, 0), question)
        except Failure as failure:
            raise UserError(f"the teacher at {self.url} {failure}") from None
        scored = parse_scores(reply, CRITERIA) is not None
        return {
            "url": self.url,
            "model": self.model,
            "token_cap": self._token_cap,
            "reply": reply[:LONGEST_REPLY],
            "scored": scored,
        }

    async def _judge(self, opening: str, story: str, index: int) -> Judgement:
        # Where one failure stops all, most of the others are never waited for: asyncio need not report them.
        asyncio.current_task().add_done_callback(lambda task: task.cancelled() or task.exception())
        if not clean(story).strip():
            return Judgement(dict.fromkeys(CRITERIA, 0), "", 0, 0, 0.0, None)
        mark = fence(self.seed, index, f"{opening}\n{story}")
        question = _Question(render(opening, story, fence=mark), mark)
        scores, replies, error = None, [], None
        while scores is None and error is None:
            attempt = len(replies)
            try:
                replies.append(await self._reply(question, attempt))
            except Failure as failure:
                error = f"the teacher {failure}"
            else:
                scores = parse_scores(replies[-1], CRITERIA)
                if scores is None and len(replies) == self.attempts:
                    error = f"no scores in {len(replies)} replies"
        return Judgement(
            scores,
            replies[-1][:LONGEST_REPLY] if replies else "",
            len(replies),
            # A word is a token or more. Where a server ignores the cap, what lies beyond it is read by nobody.
            sum(min(len(reply.split()), self.max_tokens) for reply in replies),
            0.0 if question.since is None else time.monotonic() - question.since,
            error,
        )

    async def _reply(self, question: _Question, attempt: int) -> str:
        """One reply: a kept one, or a new one, kept."""
        if self._cache is None:
            return await self._patiently(lambda: self._ask(question, attempt), question)
        key = cache_key(self.model, question.messages, question.mark, self._sampling(attempt))
        reply = self._cache.get(key)
        if reply is not None:
            self.counts["cached"] += 1
            return reply
        reply = await self._patiently(lambda: self._ask(question, attempt), question)
        return self._cache.put(key, reply, model=self.model, attempt=attempt)

    def _sampling(self, attempt: int) -> dict:
        seed = (self.seed + attempt) % 2**31  # servers take 32 bits
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": seed}

    def _ask(self, question: _Question, attempt: int) -> Awaitable[str]:
        sampling = self._sampling(attempt)
        sampling[self._token_cap] = sampling.pop("max_tokens")
        return self._server.chat(model=self.model, messages=question.messages, **sampling)

    async def _patiently(self, request: Callable[[], Awaitable], question: _Question, reached: bool = True):
        """The outcome of `request`, asked again after failures that may pass; Failure when it is given up.

        Each request waits for a free slot, and a story that pauses holds none. With `reached` False, a server that
        cannot be reached at all is given up at once.
        """
        for failures in itertools.count(1):
            async with self._slots.one(first=question.since is not None):
                if self._fatal is not None:
                    raise self._fatal
                if question.since is None:
                    question.since = time.monotonic()
                left = question.since + self.deadline_s - time.monotonic()
                self.counts["requests"] += 1
                try:
                    answer = await asyncio.wait_for(request(), min(max(left, 0.0), self.deadline_s / self.attempts))
                    self._slots.widen()
                    return answer
                except asyncio.TimeoutError:  # the name that Python 3.10 has as well
                    failure = Failure("takes too long to answer", again=True)
                except Failure as error:
                    failure = error
            self.counts["failures"] += 1
            if failure.fatal:
                self._stop(failure)
            if failure.busy:
                self._slots.narrow()
            pause = min(PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
            if failure.retry_after is not None:
                pause += min(failure.retry_after, LONGEST_RETRY_AFTER_S)
            late = time.monotonic() + pause > question.since + self.deadline_s
            if failure.again and not late and (failures < FAILURES or failure.busy) and (reached or failure.status):
                await asyncio.sleep(pause)
                continue
            if failure.unreachable:  # again and again, so it is not this story's fault
                self._stop(failure)
            raise failure

    def _stop(self, failure: Failure) -> NoReturn:
        self._fatal = UserError(f"the teacher at {self.url} {failure}")
        raise self._fatal


class _Slots:
    """How many requests may be on their way: `most`, halved whenever the server says that it is too many (at most
    once a second: a burst is one complaint), and one more again for each full round that goes well."""

    def __init__(self, most: int):
        self.most, self.limit, self.taken = most, float(most), 0
        self._narrowed = 0.0
        self._queue: deque[asyncio.Future] = deque()

    @asynccontextmanager
    async def one(self, first: bool):
        """Wait for a slot and hold it; `first` before all that wait, for a story that held one before."""
        turn = asyncio.get_running_loop().create_future()
        (self._queue.appendleft if first else self._queue.append)(turn)
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self.taken -= 1
                self._admit()

    def _admit(self) -> None:
        while self._queue and self.taken < int(self.limit):
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                self.taken += 1

    def widen(self) -> None:
        self.limit = min(self.limit + 1 / self.limit, self.most)

    def narrow(self) -> None:
        if time.monotonic() - self._narrowed > 1.0:
            self._narrowed = time.monotonic()
            self.limit = max(self.limit / 2, 1.0)


def _base_url(url: str) -> str:
    """`url` with the path that these servers share, /v1, where it has none."""
    try:
        parts = urlsplit(url.strip())
        parts.port  # noqa: B018 - raises where it is no number
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError("the teacher's URL must look like http://127.0.0.1:8000/v1 or https://host/v1")
    if parts.username is not None or parts.password is not None:
        raise UserError("the teacher's URL must not hold a name or password: put the key in OPENAI_API_KEY")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
