"""Asking the teacher: any server that speaks OpenAI's chat completions, and nothing lost when it misbehaves.

One event loop in a thread of its own sends the stories, so they can be judged while others are still being written.
Every story ends with scores that the teacher gave, or with none; no failure ever becomes a number.
"""

import asyncio
import concurrent.futures
import contextlib
import hashlib
import itertools
import os
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import urlsplit

from tinystory.errors import UserError
from tinystory.teacher import probe as probing
from tinystory.teacher.api import Failure, Reply, Server
from tinystory.teacher.cache import Cache, Kept, cache_key
from tinystory.teacher.judgement import Judgement, nothing_to_grade, verdict
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.probe import Probe
from tinystory.teacher.prompt import Template, fence, render
from tinystory.teacher.score import LONGEST_REPLY, expected_scores, parse_scores
from tinystory.teacher.slots import Slots

FAILURES = 8  # failed requests after which a story is given up; with the pauses below, a minute or more
PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # before the first and the latest of them; jittered, doubled each time
LONGEST_RETRY_AFTER_S = 60.0
FIRST_STORY = "Once upon a time,", "a cat sat down by the fire and slept."  # the probe's opening and story
TEMPLATE_TOKENS = 256  # the most that a chat template adds to two messages
STORY_WORDS = 80  # what a forecast takes a story to be
TOKENS_A_WORD = 1.4  # of English stories, in the tokens of common models: 1.2 to 1.4


@dataclass
class _Question:
    """A story on its way: the messages, the mark in them, and when its first request was sent."""

    messages: list[dict]
    mark: str
    since: float | None = None


class Teacher:
    """A teacher behind `url`, asked by at most `concurrency` requests at a time.

    A story's requests all end within `deadline_s` seconds of its first; each is given a fair part of that, or less once
    it is known how fast the server answers (see `Slots.patience`). A reply that holds no scores is asked for again with
    another seed, `attempts` times at most. With `logprobs`, scores are expectations (see `expected_scores`), and a
    reply without what they are made of is none. `cache` is the path of a file that keeps every reply (see cache.py).
    The key is OPENAI_API_KEY; servers of one's own need none. `template` says what is graded. Prices are per million
    tokens, and no request is sent that could take the cost past `budget_cost`.

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
        self._token_cap, self._refused, self._quiet, self._held_to = "max_tokens", set(), False, "nothing"
        self._probed: Probe | None = None
        self._most_in = 0  # tokens of the longest prompt so far, at most
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
        """Ask the server what it is and what it can do, once: eight requests or so, and one if the cache's file holds
        the answers.

        The model is the first that it lists, if none was named. UserError where the server is not there, is no
        OpenAI-compatible API, does not list the model, refuses, or has a model that thinks for longer than a reply.
        """
        if self._probed is None:
            self._probed = self._run(self._probe()).result()
        return self._probed

    def stats(self) -> dict[str, float | None]:
        """What was asked and how fast it came, since the last call (see `Ledger.stats`); `cost` is of the whole run."""
        return self.ledger.stats()

    def forecast(self, stories: int, opening: str) -> dict[str, float]:
        """What grading so many stories will take, judged by the probe: {"stories", "tokens_in", "tokens_out", "words"
        (of replies, for the student's budget), "cost", "hours"}, all replies readable at once and none asked twice."""
        found = self.probe()
        longer = len(opening.split()) + STORY_WORDS - len(" ".join(FIRST_STORY).split())
        measured = len(str(render(*FIRST_STORY, fence="=", **self._asked()))) / 4, len(found.reply) / 2  # characters
        asked, said = found.tokens or measured
        tokens = stories * (asked + longer * TOKENS_A_WORD), stories * said
        return {
            "stories": stories,
            "tokens_in": round(tokens[0]),
            "tokens_out": round(tokens[1]),
            "words": stories * len(found.reply.split()) + len(opening.split()),
            "cost": self.ledger.price(*tokens),
            "hours": stories * found.seconds / self._slots.most / 3600,
        }

    def affords(self, stories: int) -> bool:
        """True if so many more stories stay within `budget_cost`, whatever becomes of them."""
        requests = stories * self.attempts
        return self.ledger.affords(requests * self._most_in, requests * self.max_tokens)

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

    async def _probe(self) -> Probe:
        try:
            models = await self._patiently(self._server.models, _Question([], ""), reached=False)
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
        if self._held_to == "json":
            self.max_tokens = max(self.max_tokens, probing.json_tokens(self.template.names))
        return found

    async def _find_out(self) -> Probe:
        names, seconds = self.template.names, []

        async def ask(messages: list[dict], **sampling) -> Reply:
            began = time.monotonic()
            try:
                reply = await asyncio.wait_for(self._chat(messages, **sampling), self.deadline_s / self.attempts)
            except asyncio.TimeoutError:
                raise Failure("takes too long to answer", again=True) from None
            seconds.append(time.monotonic() - began)
            return reply

        mark = fence(self.seed, -1, "\n".join(FIRST_STORY))
        question = _Question(render(*FIRST_STORY, fence=mark, **self._asked()), mark)
        first = await self._first(lambda: ask(question.messages, **self._sampling(0)), question)
        thinks, scored = probing.think(first), parse_scores(first.text, names) is not None
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
            if not await probing.weighs(lambda: ask(question.messages, **asked), names):
                raise Failure(
                    f"has a model, {self.model}, that gives no log-probabilities of the single digits of its scores: "
                    "leave --teacher-logprobs out, or ask a server that does"
                )
        seed, logprobs = await probing.find_seed_and_logprobs(ask)
        return Probe(
            self.url, self.model, first.text[:LONGEST_REPLY], scored, self._token_cap, tuple(sorted(self._refused)),
            thinks, self._quiet, structure, held_to, seed, logprobs, first.tokens, min(seconds),
        )  # fmt: skip

    async def _first(self, request: Callable[[], Awaitable[Reply]], question: _Question) -> Reply:
        """The outcome of `request`, asked again without what the server refuses by name."""
        while True:
            try:
                return await self._patiently(request, question)
            except Failure as failure:
                said = str(failure) if failure.status in (400, 422) else ""
                named = {name for name in ("temperature", "seed") if re.search(rf"\b{name}\b", said)}
                if self._token_cap == "max_tokens" and "max_completion_tokens" in said:
                    self._token_cap = "max_completion_tokens"
                elif named - self._refused:
                    self._refused |= named
                else:
                    raise

    def _asked(self) -> dict:
        return {"criteria": self.template.criteria, "preface": self.template.preface}

    async def _judge(self, opening: str, story: str, index: int) -> Judgement:
        # Where one failure stops all, most of the others are never waited for: asyncio need not report them.
        asyncio.current_task().add_done_callback(lambda task: task.cancelled() or task.exception())
        judgement = nothing_to_grade(self.template, story)
        if judgement is not None:
            return judgement
        mark = fence(self.seed, index, f"{opening}\n{story}")
        question = _Question(render(opening, story, fence=mark, **self._asked()), mark)
        scores, replies, error = None, [], None
        while scores is None and error is None:
            try:
                reply, expected = await self._reply(question, attempt=len(replies))
            except Failure as failure:
                error = f"the teacher {failure}"
            else:
                replies.append(reply)
                scores = expected if self.logprobs else parse_scores(reply, self.template.names)
                if scores is None and len(replies) == self.attempts:
                    error = f"no scores in {len(replies)} replies"
        seconds = 0.0 if question.since is None else time.monotonic() - question.since
        return verdict(self.template, scores, replies, self.max_tokens, seconds, error)

    async def _reply(self, question: _Question, attempt: int) -> Kept:
        """One reply: a kept one, or a new one, kept."""
        sampling = self._sampling(attempt) | (probing.LOGPROBS if self.logprobs else {})
        if self._cache is not None:
            key = cache_key(self.model, question.messages, question.mark, sampling | {"held_to": self._held_to})
            kept = self._cache.get(key)
            if kept is not None:
                self.ledger.count("cached")
                return kept
        held = probing.options(self._held_to, self.template.names)
        reply = await self._patiently(lambda: self._chat(question.messages, **sampling, **held), question)
        kept = Kept(reply.text)
        if self.logprobs:
            kept = Kept(reply.text, expected_scores(reply.text, self.template.names, reply.logprobs))
        if self._cache is None:
            return kept
        return self._cache.put(key, kept, model=self.model, attempt=attempt, tokens=reply.tokens)

    def _sampling(self, attempt: int) -> dict:
        seed = (self.seed + attempt) % 2**31  # servers take 32 bits
        return {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": seed}

    async def _chat(self, messages: list[dict], *, max_tokens: int, **request) -> Reply:
        request = {name: value for name, value in request.items() if name not in self._refused}
        if self._quiet:
            request["extra_body"] = request.get("extra_body", {}) | probing.NO_THINKING
        request[self._token_cap] = max_tokens
        # A token is a byte or more, and the chat template adds a few of its own. Where the server counted the tokens of
        # a first story, only the part that differs from it is in doubt.
        told = [len(message["content"].encode()) for message in messages]
        counted = self._probed.tokens if self._probed is not None else None
        most = counted[0] + told[-1] if counted and len(told) == 2 else sum(told) + TEMPLATE_TOKENS
        self._most_in = max(self._most_in, most)
        while self.ledger.must_wait(most, max_tokens):  # only ever at a budget's very end
            await asyncio.sleep(0.01)
        self.ledger.count("requests")
        began = time.monotonic()
        with self.ledger.request(most, max_tokens) as receipt:
            reply = await self._server.chat(model=self.model, messages=messages, **request)
            receipt.tokens = reply.tokens
        self.ledger.answered(time.monotonic() - began)
        return reply

    async def _patiently(self, request: Callable[[], Awaitable], question: _Question, reached: bool = True):
        """The outcome of `request`, asked again after failures that may pass; Failure when it is given up.

        Each request waits for a free slot, and a story that pauses holds none. With `reached` False, a server that
        cannot be reached at all is given up at once.
        """
        timeouts = 0
        for failures in itertools.count(1):
            async with self._slots.one(first=question.since is not None):
                if self._fatal is not None:
                    raise self._fatal
                began = time.monotonic()
                if question.since is None:
                    question.since = began
                left = max(question.since + self.deadline_s - began, 0.0)
                try:
                    patience = self._slots.patience(self.deadline_s / self.attempts, timeouts)
                    answer = await asyncio.wait_for(request(), min(left, patience))
                    self._slots.answered(time.monotonic() - began)
                    return answer
                except asyncio.TimeoutError:  # the name that Python 3.10 has as well
                    failure = Failure("takes too long to answer", again=True)
                    timeouts += 1
                except Failure as error:
                    failure = error
            self.ledger.count("failures")
            if failure.fatal:
                self._stop(failure)
            if failure.busy:
                self._slots.turned_away()
            pause = min(PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)
            if failure.retry_after is not None:
                pause += min(failure.retry_after, LONGEST_RETRY_AFTER_S)
            late = time.monotonic() + pause > question.since + self.deadline_s
            if failure.again and not late and (failures < FAILURES or failure.busy) and (reached or failure.status):
                self.ledger.count("retries")
                await asyncio.sleep(pause)
                continue
            if failure.unreachable:  # again and again, so it is not this story's fault
                self._stop(failure)
            raise failure

    def _stop(self, failure: Failure) -> NoReturn:
        self._fatal = UserError(f"the teacher at {self.url} {failure}")
        raise self._fatal


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
