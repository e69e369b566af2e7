"""Grades stories by asking a model on one or several servers with an OpenAI-compatible API. The
requests run in a thread of their own, so stories are graded while others are still being written.
What happens to one story is in `Teacher._grade`. A failure is never taken for a score."""

import asyncio
import concurrent.futures
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from tinystory.run.errors import Stop, UserError
from tinystory.run.text import is_blank
from tinystory.teacher.api import ChatClient, Failure, Reply
from tinystory.teacher.cache import Cache, CachedReply
from tinystory.teacher.endpoint import Endpoint, Options, Probe, base_url
from tinystory.teacher.grade import Grade, Grader, too_few_scores
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.parse import LONGEST_REPLY, parse_scores
from tinystory.teacher.pool import ServerPool, leave_out
from tinystory.teacher.probe import FIRST_STORY, HUMAN, HUMAN_S, Prober
from tinystory.teacher.prompt import Question, fence, render

SILENCE_S = 60.0  # seconds of waiting before progress is printed
STORY_WORDS = 80  # length of a story in a forecast
# English stories have 1.2 to 1.4 tokens per word under the tokenizers of common models
TOKENS_PER_WORD = 1.4


class Teacher(Grader):
    """The teacher at `urls`: one server or several, of one model. A story whose reply holds no
    scores is sent again with another seed, up to `attempts` times. A failure that a retry cannot
    fix (wrong key, exhausted quota, unknown model, too short a context) raises UserError from
    whatever waits for a grade, and no further story is sent.

    models: one for all servers or one each; None: the first one listed. concurrency: requests in
    flight per server. cache: file for replies (cache.py). The keys are OPENAI_API_KEY_1, _2 ... in
    the order of the URLs, else OPENAI_API_KEY. max_unscored: tolerated fraction (see `grades`).
    price_in, price_out: per million tokens. budget_cost: a request that could exceed it is not
    sent. options: the fields of `Options`."""

    def __init__(
        self,
        urls: str | Sequence[str],
        models: str | Sequence[str] | None = None,
        *,
        concurrency: int = 16,
        cache: str | os.PathLike | None = None,
        max_unscored: float = 1.0,
        price_in: float = 0.0,
        price_out: float = 0.0,
        budget_cost: float = 0.0,
        **options: Any,
    ):
        super().__init__({})  # `probes` fills in the facts
        urls = [base_url(url) for url in ([urls] if isinstance(urls, str) else urls)]
        names: Sequence[str | None] = [models] if isinstance(models, str) else models or [None]
        if len(names) not in (1, len(urls)) or len(set(urls)) < len(urls):
            raise UserError(
                f"name each teacher's URL once, and one model for all or one for each URL: there are {len(names)} "
                f"models and {len(set(urls))} URLs"
            )
        self.options = Options(**options)
        self.concurrency = concurrency
        self.max_unscored = max_unscored
        self.cache = Cache(cache)
        self.ledger = Ledger(price_in, price_out, budget_cost, self.cache.charged)
        self.endpoints: list[Endpoint] = []
        for i, url in enumerate(urls):
            own_key = os.environ.get(f"OPENAI_API_KEY_{i + 1}")
            client = ChatClient(url, own_key or os.environ.get("OPENAI_API_KEY", ""))
            model = names[i % len(names)]
            endpoint = Endpoint(url, model, client, concurrency, self.ledger, self.options)
            self.endpoints.append(endpoint)
        self.pool = ServerPool(self.endpoints)
        self._fatal: UserError | None = None  # once set, no further story can be graded
        # those that were probed; the first one's model and probe are in all cache keys
        self._present: list[Endpoint] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
        self._thread.start()

    # ---- what a run asks of it -------------------------------------------------------------------

    def submit(self, question: Question, afresh: bool = False) -> Future[Grade]:
        """Send a story now; returns its future grade. afresh: ignore replies from earlier
        processes."""
        self.probes()
        return asyncio.run_coroutine_threadsafe(self._grade(question, afresh), self._loop)

    def grades(self, questions: Sequence[Question], stop: Stop | None = None) -> list[Grade]:
        """If too many are unscored, those whose replies came from an earlier process are asked
        about again: the teacher may have been fixed."""
        futures = [self.sent.pop(each, None) or self.submit(each) for each in questions]
        grades = self._wait(futures, stop)
        if too_few_scores(grades, self.max_unscored):
            old = [i for i, grade in enumerate(grades) if grade.score is None and not grade.asked]
            futures = [self.submit(questions[i], afresh=True) for i in old]
            for i, grade in zip(old, self._wait(futures, stop), strict=True):
                grades[i] = grade
        return grades

    def _wait(self, futures: Sequence[Future[Grade]], stop: Stop | None) -> list[Grade]:
        waiting = set(futures)
        silent_until = time.monotonic() + SILENCE_S
        bar = tqdm(
            total=len(futures), desc="teacher", unit="story", leave=False, delay=2, disable=None
        )
        with bar:
            while waiting:
                done, waiting = concurrent.futures.wait(
                    waiting, 0.2, concurrent.futures.FIRST_EXCEPTION
                )
                bar.update(len(done))
                for future in done:
                    future.result()  # raises a fatal failure (wrong key, unknown model) at once
                if waiting and time.monotonic() > silent_until and self.model != HUMAN:
                    silent_until = math.inf
                    count = f"{len(futures) - len(waiting)} of {len(futures)}"
                    tqdm.write(
                        f"{self.model} has graded {count} stories so far: the server, or this machine, is busy"
                    )
                if waiting and stop is not None and stop.requested:
                    for future in waiting:
                        future.cancel()
                    stop.check()
        return [future.result() for future in futures]

    def probes(self) -> list[Probe]:
        """Probe each server once: about four requests, or one if the cache holds the result, which
        then serves even if the server cannot be reached. The first probe counts for cache keys.
        Raises UserError if no server can be reached, or if one has no OpenAI-compatible API, lacks
        the model, refuses the request or does not reply in time."""
        if not self._present:
            asyncio.run_coroutine_threadsafe(self._probe_all(), self._loop).result()
            kept = [key for key, _ in self.cache.items()]
            present = [endpoint for endpoint in self.endpoints if endpoint.probe]
            self._present = sorted(present, key=lambda endpoint: kept.index(endpoint.probe_key))
            if len({endpoint.model for endpoint in present}) > 1:
                tqdm.write(f"warning: {self.model} are taken for one model")
        probes = [endpoint.probe for endpoint in self._present if endpoint.probe]
        if not self.facts:
            scored_by = ", ".join(f"{probe.model} at {probe.url}" for probe in probes)
            self.facts |= {"scored_by": scored_by, "teacher": asdict(probes[0])}
        return probes

    @property
    def model(self) -> str:
        """The model's name, once known; several names if servers call it differently."""
        names = dict.fromkeys(endpoint.model for endpoint in self.endpoints)
        return ", ".join(name for name in names if name)

    @property
    def longest_reply(self) -> int:
        """Upper bound on the tokens of a reply that are used."""
        return max(endpoint.max_tokens for endpoint in self.endpoints)

    @property
    def most_words(self) -> int:
        return self.longest_reply * self.options.attempts  # a word is at least one token

    def affords(self, stories: int) -> bool:
        thoughts = max(probe.least_tokens for probe in self.probes())
        requests = stories * self.options.attempts
        tokens_out = requests * max(self.longest_reply, thoughts)
        return self.ledger.affords(requests * self.ledger.largest_in, tokens_out)

    def stats(self) -> dict[str, Any]:
        return {f"teacher_{name}": value for name, value in self.ledger.stats().items()}

    def forecast(self, stories: int, opening: str) -> str:
        """Estimated from the first probe, for one readable reply per story. The student reads all
        replies."""
        probes = self.probes()
        first = probes[0]
        messages = render(*FIRST_STORY, fence="=", template=self.options.template)
        # about four characters per token of text, two of digits and spaces
        estimate = len(str(messages)) / 4, len(first.reply) / 2
        prompt_tokens, reply_tokens = first.tokens or estimate
        opening_words = len(opening.split())
        probed_words = len(" ".join(FIRST_STORY).split())
        more_words = opening_words + STORY_WORDS - probed_words
        tokens_in = stories * (prompt_tokens + more_words * TOKENS_PER_WORD)
        tokens_out = stories * reply_tokens
        words_in = opening_words + stories * len(first.reply.split())
        price = self.ledger.price(tokens_in, tokens_out)
        cost = f", cost {price:.2f}" if price else ""
        per_second = sum(self.concurrency / probe.seconds for probe in probes)
        if first.model == HUMAN:
            per_second = 1 / HUMAN_S
        minutes = stories / per_second / 60
        duration = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(minutes, 1):.0f} min"
        return (
            f"{stories:,} stories, {tokens_in:,.0f} prompt tokens and {tokens_out:,.0f} reply tokens, "
            f"{words_in:,} words for the student{cost}, about {duration} of grading"
        )

    def close(self) -> None:
        """Cancel the requests in flight; close the connections and the cache."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.cache.close()

    def __enter__(self) -> "Teacher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- in the thread of the requests -----------------------------------------------------------

    async def _probe_all(self) -> None:
        """Leave out the servers that cannot be reached while another can."""
        probers = [Prober(endpoint, self.cache).examine() for endpoint in self.endpoints]
        failures = await asyncio.gather(*probers)
        for endpoint, failure in zip(self.endpoints, failures, strict=True):
            if failure is None:
                continue
            if all(failures):
                raise UserError(f"the teacher at {endpoint.url} {failure}")
            leave_out(endpoint, failure)

    async def _grade(self, question: Question, afresh: bool) -> Grade:
        """One story is sent up to `attempts` times. The first reply with scores counts."""
        # After a fatal failure nobody awaits the other tasks, whose failures asyncio would print.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        options = self.options
        template = options.template
        if is_blank(question.story):
            return Grade(dict.fromkeys(template.names, 0), 0.0)  # as the instructions say

        first = self._present[0]
        mark = fence(options.seed, question.number, f"{question.opening}\n{question.story}")
        messages = render(question.opening, question.story, fence=mark, template=template)
        asked = False
        scores: Mapping[str, int] | None = None
        error: str | None = f"no scores in {options.attempts} replies"
        replies: list[str] = []
        for attempt in range(options.attempts):
            key = first.reply_key(messages, mark, options.seed + attempt)
            # A failure is kept for this story only, not for an equal one.
            failure_key = f"{key} {question.number}"
            earlier = not afresh
            reply = self.cache.get(failure_key, earlier) or self.cache.get(key, earlier)
            if reply is None:
                asked = True
                reply = await self._reply(messages, attempt, key, failure_key, afresh)
            else:
                self.ledger.total["cached"] += 1
            if reply.error:
                error = reply.error
                break
            replies.append(reply.text)
            scores = parse_scores(reply.text, template.names)
            if scores is not None:
                error = None
                break

        # A word is at least one token. Some servers ignore max_tokens: more words are not used.
        words = sum(min(len(reply.split()), self.longest_reply) for reply in replies)
        return Grade(
            scores,
            score=None if scores is None else template.score(scores),
            reply=replies[-1][:LONGEST_REPLY] if replies else "",
            attempts=len(replies),
            reply_words=words,
            asked=asked,
            error=error,
        )

    async def _reply(
        self, messages: list[dict], attempt: int, key: str, failure_key: str, afresh: bool
    ) -> CachedReply:
        """The reply from a server; it is cached before it is used."""

        async def chat(endpoint: Endpoint) -> Reply:
            if self._fatal is not None:
                raise self._fatal
            return await endpoint.chat(messages, self.options.seed + attempt)

        try:
            reply = await self.pool.ask(chat)
        except Failure as failure:
            if failure.fatal or failure.unreachable:  # no other story can be graded either
                self._fatal = UserError(f"the teacher at {failure.url} {failure}")
                raise self._fatal from None
            failed = CachedReply("", error=f"the teacher {failure}")
            charged = self.ledger.charged
            return self.cache.put(failure_key, failed, again=afresh, charged=charged)
        if self.cache.get(failure_key):  # an earlier process's, which this reply replaces
            key = failure_key
        about = {"tokens": reply.tokens, "charged": self.ledger.charged}
        return self.cache.put(key, CachedReply(reply.text), again=afresh, **about)

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for endpoint in self.endpoints:
            await endpoint.client.close()
