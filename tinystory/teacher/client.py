"""The teacher's client: any server with OpenAI's chat completions can grade, and no failure of it is taken for a score.

An event loop in its own thread sends the stories, so some are graded while others are still being written. Every story
ends either with scores that the teacher gave or with none.
"""

import asyncio
import concurrent.futures
import contextlib
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from tinystory.errors import UserError
from tinystory.teacher import probe as probing
from tinystory.teacher.api import Failure, Reply, Server
from tinystory.teacher.cache import Cache, Kept, cache_key
from tinystory.teacher.grade import (
    LONGEST_REPLY,
    Grade,
    expected_scores,
    grade_if_empty,
    grade_of,
    parse_scores,
)
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.probe import Probe
from tinystory.teacher.prompt import Template, fence, render
from tinystory.teacher.slots import Slots

T = TypeVar("T")
FAILURES = 8  # failed requests after which a story is given up; with the pauses below, after a minute or more
PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # before the first retry, and before any; doubled each time, with jitter
LONGEST_RETRY_AFTER_S = 60.0
FIRST_STORY = "Once upon a time,", "a cat sat down by the fire and slept."  # the probe's opening and story
TEMPLATE_TOKENS = 256  # upper bound on what a chat template adds to two messages
PERSON = "person"  # the model of a server behind which a person grades (scripts/teach.py)
PATIENCE_S = 3 * 86_400.0
STORY_WORDS = 80  # length of a story in a forecast
TOKENS_PER_WORD = 1.4  # English stories have 1.2 to 1.4 tokens per word under the tokenizers of common models


@dataclass
class _Question:
    """A story being graded: the messages, the fence in them, and when its first request was sent."""

    messages: list[dict]
    fence: str
    since: float | None = None


class Teacher:
    """A client of the teacher at `url`, with at most `concurrency` requests in flight.

    A story's requests all end within `deadline_s` seconds of its first; the timeout of each is deadline_s / attempts,
    or less once the server's speed is known (see `Slots.timeout`). If a reply holds no scores, the story is sent again
    with another seed, up to `attempts` times. With `logprobs`, scores are expected values (see `expected_scores`), and
    a reply without the log-probabilities that they need holds none. cache: path of the file that keeps every reply (see
    cache.py). api_key: default OPENAI_API_KEY; local servers need none. template: what is graded. Prices are per
    million tokens, and no request is sent that could take the cost beyond `budget_cost`.

    A failure that a retry cannot fix (a refused key, an exhausted quota, an unknown model, a story too long for the
    model's context) raises UserError from whatever waits for a grade, and no further story is sent.
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
        template: Template = Template(),  # noqa: B008 - frozen
        logprobs: bool = False,
        price_in: float = 0.0,
        price_out: float = 0.0,
        budget_cost: float | None = None,
    ):
        self.url = _base_url(url)
        self.model, self.template, self.logprobs = model, template, logprobs
        self.temperature, self.seed, self.max_tokens = temperature, seed, max_tokens
        self.deadline_s, self.attempts = deadline_s, attempts
        self.ledger = Ledger(price_in, price_out, budget_cost)
        self._token_cap, self._quiet, self._held_to = "max_tokens", False, "nothing"
        self._refused: set[str] = set()
        self._probed: Probe | None = None
        self._most_in = 0  # upper bound on the tokens of the longest prompt so far
        self._fatal: UserError | None = None
        self._server = Server(self.url, api_key or os.environ.get("OPENAI_API_KEY"), deadline_s / attempts)
        self._cache = None if cache is None else Cache(cache)
        if self._cache is not None:
            self.ledger.paid_before(*self._cache.tokens)
        self._slots = Slots(concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
        self._thread.start()

    def probe(self) -> Probe:
        """Find out what the server can do, once: about eight requests, or one if the cache holds the result.

        If no model was named, the first one listed is used. Raises UserError if the server cannot be reached, is not an
        OpenAI-compatible API, does not list the model, refuses, or has a model that reasons for longer than a reply.
        """
        if self._probed is None:
            self._probed = self._run(self._probe()).result()
        return self._probed

    def stats(self) -> dict[str, float | None]:
        """Requests, tokens and latencies since the last call, and the cost of the whole run (see `Ledger.stats`)."""
        return self.ledger.stats()

    def forecast(self, stories: int, opening: str) -> dict[str, float]:
        """Estimate, from the probe, of grading so many stories: {"stories", "tokens_in", "tokens_out", "words" (the
        opening and all replies, for the student's budget), "cost", "hours"}. It assumes one readable reply per story.
        """
        found = self.probe()
        longer = len(opening.split()) + STORY_WORDS - len(" ".join(FIRST_STORY).split())
        measured = len(str(render(*FIRST_STORY, fence="=", **self._rubric()))) / 4, len(found.reply) / 2  # characters
        asked, said = found.tokens or measured
        tokens = stories * (asked + longer * TOKENS_PER_WORD), stories * said
        return {
            "stories": stories,
            "tokens_in": round(tokens[0]),
            "tokens_out": round(tokens[1]),
            "words": stories * len(found.reply.split()) + len(opening.split()),
            "cost": self.ledger.price(*tokens),
            "hours": stories * found.seconds / self._slots.most / 3600,
        }

    def affords(self, stories: int) -> bool:
        """True if grading so many more stories stays within `budget_cost` even if each takes every attempt."""
        requests = stories * self.attempts
        return self.ledger.affords(requests * self._most_in, requests * self.max_tokens)

    def submit(self, opening: str, story: str, index: int, again: int = 0) -> "concurrent.futures.Future[Grade]":
        """Send one story, after `probe`. index: the story's number in the run, from which its fence is derived. again:
        how often the same story was sent before, if it is to be judged anew: with other seeds, and not from the cache.

        A story without text gets 0 for each criterion, by the rubric, and is not sent.
        """
        self.probe()
        return self._run(self._grade(opening, story, index, again))

    def grade(
        self,
        opening: str,
        stories: Sequence[str],
        first_index: int,
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[Grade]:
        """The grades of `stories`, in the same order; `progress(1)` is called after each one."""
        futures = [self.submit(opening, story, first_index + i) for i, story in enumerate(stories)]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                progress(1)
        finally:  # after an error or Ctrl-C nothing stays in flight
            for future in futures:
                future.cancel()
        return [future.result() for future in futures]

    def close(self) -> None:
        """Cancel the requests in flight, and close the connections and the cache."""
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

    def __exit__(self, *_: object) -> None:
        self.close()

    # All coroutines below run on the event loop's thread.

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _shut(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.close()

    async def _probe(self) -> Probe:
        try:
            models = await self._retried(self._server.models, _Question([], ""), reached=False)
            if self.model is None:
                if not models:
                    raise UserError(f"the teacher at {self.url} lists no model: load one, or name it")
                self.model = models[0]
            elif self.model not in models:
                listed = self._server.words(", ".join(models)) or "none"
                raise UserError(f"the teacher at {self.url} has no model {self.model!r}; it lists: {listed}")
            about = f"{self.url} {self.model} {self.max_tokens} {self.temperature} {self.logprobs} {self.template}"
            key = "probe " + hashlib.sha256(about.encode()).hexdigest()[:24]
            kept = self._cache.get(key) if self._cache is not None else None
            found = kept and Probe.load(kept.reply)
            if not found:
                found = await self._find_out()
                if self._cache is not None:
                    self._cache.put(key, Kept(found.dump()))
        except Failure as failure:
            raise UserError(f"the teacher at {self.url} {failure}") from None
        self._token_cap, self._refused, self._quiet = found.token_cap, set(found.refused), found.quiet
        self._held_to = found.held_to
        if self.model == PERSON:  # who may stop for lunch
            self.deadline_s = self._slots.shortest = PATIENCE_S
        if self._held_to == "json":
            self.max_tokens = max(self.max_tokens, probing.json_tokens(self.template.names))
        return found

    async def _find_out(self) -> Probe:
        names, seconds = self.template.names, list[float]()

        async def ask(messages: list[dict], **sampling: Any) -> Reply:
            began = time.monotonic()
            try:
                reply = await asyncio.wait_for(self._chat(messages, **sampling), self.deadline_s / self.attempts)
            except asyncio.TimeoutError:
                raise Failure("takes too long to answer", again=True) from None
            seconds.append(time.monotonic() - began)
            return reply

        mark = fence(self.seed, -1, "\n".join(FIRST_STORY))
        question = _Question(render(*FIRST_STORY, fence=mark, **self._rubric()), mark)
        first = await self._first(lambda: ask(question.messages, **self._sampling(0)), question)
        thinks, scored = probing.thought(first), parse_scores(first.text, names) is not None
        if thinks and not scored:
            self._quiet = True
            with contextlib.suppress(Failure):
                first = await ask(question.messages, **self._sampling(0))
            scored = parse_scores(first.text, names) is not None
            if not scored:
                raise Failure(
                    f"has a model, {self.model}, that thinks before it answers, and {self.max_tokens} tokens hold no "
                    "scores: choose a model that does not, switch its thinking off on the server, or raise "
                    "--teacher-max-tokens"
                )
        structure = await probing.find_structure(ask, names, self.max_tokens)
        held_to = "nothing" if structure == "json" and scored else structure
        if held_to != "nothing" and not scored:
            most = max(self.max_tokens, probing.json_tokens(names))
            first = await ask(question.messages, max_tokens=most, **probing.options(held_to, names))
            scored = parse_scores(first.text, names) is not None
        if self.logprobs:
            asked = {**self._sampling(0), **probing.options(held_to, names), **probing.LOGPROBS}
            if not await probing.allows_expected_scores(lambda: ask(question.messages, **asked), names):
                raise Failure(
                    f"has a model, {self.model}, that gives no log-probabilities of the single digits of its scores: "
                    "leave --teacher-logprobs out, or ask a server that does"
                )
        seed, logprobs = await probing.find_seed_and_logprobs(ask)
        assert self.model is not None
        return Probe(
            self.url, self.model, first.text[:LONGEST_REPLY], scored, self._token_cap, tuple(sorted(self._refused)),
            thinks, self._quiet, structure, held_to, seed, logprobs, first.tokens, min(seconds),
        )  # fmt: skip

    async def _first(self, request: Callable[[], Awaitable[Reply]], question: _Question) -> Reply:
        """The result of `request`, retried without any parameter that the server's error names."""
        while True:
            try:
                return await self._retried(request, question)
            except Failure as failure:
                said = str(failure) if failure.status in (400, 422) else ""
                named = {name for name in probing.OPTIONAL if re.search(rf"\b{name}\b", said)}
                if self._token_cap == "max_tokens" and "max_completion_tokens" in said:
                    self._token_cap = "max_completion_tokens"
                elif named - self._refused:
                    self._refused |= named
                else:
                    raise

    def _rubric(self) -> dict:
        return {"criteria": self.template.criteria, "preface": self.template.preface}

    async def _grade(self, opening: str, story: str, index: int, again: int) -> Grade:
        # After a fatal failure most of the other tasks are never awaited: asyncio need not report their exceptions.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        if empty := grade_if_empty(self.template, story):
            return empty
        mark = fence(self.seed, index, f"{opening}\n{story}")
        question = _Question(render(opening, story, fence=mark, **self._rubric()), mark)
        scores: Mapping[str, float] | None = None
        replies: list[str] = []
        error: str | None = None
        while scores is None and error is None:
            try:
                reply, expected = await self._reply(question, attempt=len(replies) + again * self.attempts)
            except Failure as failure:
                error = f"the teacher {failure}"
            else:
                replies.append(reply)
                scores = expected if self.logprobs else parse_scores(reply, self.template.names)
                if scores is None and len(replies) == self.attempts:
                    error = f"no scores in {len(replies)} replies"
        seconds = 0.0 if question.since is None else time.monotonic() - question.since
        return grade_of(self.template, scores, replies, max_tokens=self.max_tokens, seconds=seconds, error=error)

    async def _reply(self, question: _Question, attempt: int) -> Kept:
        """One reply: from the cache, or a new one, which is then kept there."""
        sampling = self._sampling(attempt) | (probing.LOGPROBS if self.logprobs else {})
        if self._cache is not None:
            assert self.model is not None  # since the probe
            key = cache_key(self.model, question.messages, question.fence, sampling | {"held_to": self._held_to})
            kept = self._cache.get(key)
            if kept is not None:
                self.ledger.count("cached")
                return kept
        held = probing.options(self._held_to, self.template.names)
        reply = await self._retried(lambda: self._chat(question.messages, **sampling, **held), question)
        kept = Kept(reply.text)
        if self.logprobs:
            kept = Kept(reply.text, expected_scores(reply.text, self.template.names, reply.logprobs))
        if self._cache is None:
            return kept
        return self._cache.put(key, kept, model=self.model, attempt=attempt, tokens=reply.tokens)

    def _sampling(self, attempt: int) -> dict:
        seed = (self.seed + attempt) % 2**31  # servers take 32 bits
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": seed}

    async def _chat(self, messages: list[dict], *, max_tokens: int, **request: Any) -> Reply:
        request = {name: value for name, value in request.items() if name not in self._refused}
        if self._quiet:
            request["extra_body"] = request.get("extra_body", {}) | probing.NO_THINKING
        request[self._token_cap] = max_tokens
        # An upper bound on the prompt's tokens: a token is at least one byte, and the chat template adds a few. If the
        # server counted the tokens of the probe's story, only the part that differs from it is uncertain.
        sizes = [len(message["content"].encode()) for message in messages]
        counted = self._probed.tokens if self._probed is not None else None
        most = counted[0] + sizes[-1] if counted and len(sizes) == 2 else sum(sizes) + TEMPLATE_TOKENS
        self._most_in = max(self._most_in, most)
        while self.ledger.must_wait(most, max_tokens):  # only near the end of a budget
            await asyncio.sleep(0.01)
        self.ledger.count("requests")
        began = time.monotonic()
        with self.ledger.request(most, max_tokens) as receipt:
            reply = await self._server.chat(model=self.model, messages=messages, **request)
            receipt.tokens = reply.tokens
        self.ledger.answered(time.monotonic() - began)
        return reply

    async def _retried(self, request: Callable[[], Awaitable[T]], question: _Question, reached: bool = True) -> T:
        """The result of `request`, retried after transient failures; raises Failure when it is given up.

        Each request waits for a free slot, and a story that pauses holds none. reached: whether the server is known to
        exist; if not, one that cannot be reached is given up at once.
        """
        failures = timeouts = 0
        while True:
            failures += 1
            async with self._slots.one(first=question.since is not None):
                if self._fatal is not None:
                    raise self._fatal
                began = time.monotonic()
                if question.since is None:
                    question.since = began
                left = max(question.since + self.deadline_s - began, 0.0)
                try:
                    timeout = self._slots.timeout(self.deadline_s / self.attempts, timeouts)
                    answer = await asyncio.wait_for(request(), min(left, timeout))
                    self._slots.answered(time.monotonic() - began)
                    return answer
                except asyncio.TimeoutError:  # the builtin TimeoutError only from Python 3.11 on
                    failure = Failure("takes too long to answer", again=True)
                    timeouts += 1
                except Failure as error:
                    failure = error
            self.ledger.count("failures")
            if failure.fatal:
                self._stop(failure)
            if failure.busy:
                self._slots.refused()
            pause = min(PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
            if failure.retry_after is not None:
                pause += min(failure.retry_after, LONGEST_RETRY_AFTER_S)
            late = time.monotonic() + pause > question.since + self.deadline_s
            if failure.again and not late and (failures < FAILURES or failure.busy) and (reached or failure.status):
                self.ledger.count("retries")
                await asyncio.sleep(pause)
                continue
            if failure.unreachable:  # after all retries, so the story is not the cause
                self._stop(failure)
            raise failure

    def _stop(self, failure: Failure) -> NoReturn:
        self._fatal = UserError(f"the teacher at {self.url} {failure}")
        raise self._fatal


def _base_url(url: str) -> str:
    """`url`, with the usual path /v1 if it has none."""
    try:
        parts = urlsplit(url.strip())
        parts.port  # noqa: B018 - raises ValueError if it is not a number
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError("the teacher's URL must look like http://127.0.0.1:8000/v1 or https://host/v1")
    if parts.username is not None or parts.password is not None:
        raise UserError("the teacher's URL must not hold a name or password: put the key in OPENAI_API_KEY")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"
