"""Grades stories by asking a model on one or several servers with an OpenAI-compatible API. The
requests run in a thread of their own, so stories are graded while others are still being written.
What happens to one story is in `Teacher._grade`. A failure is never taken for a score."""

import asyncio
import concurrent.futures
import functools
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from tinystory.run.errors import Stop, UserError
from tinystory.run.text import is_blank
from tinystory.teacher.api import ChatClient, Failure
from tinystory.teacher.cache import Cache, CachedReply
from tinystory.teacher.endpoint import Endpoint, Options, Probe, Slots, base_url
from tinystory.teacher.grade import Grade, Grader, too_few_scores
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.parse import LONGEST_REPLY, parse_scores
from tinystory.teacher.pool import ServerPool
from tinystory.teacher.probe import FIRST_STORY, HUMAN, HUMAN_S, Prober, with_oldest_probe
from tinystory.teacher.prompt import Question, fence, render

SILENCE_S = 60.0  # seconds of waiting before progress is printed
STORY_WORDS = 80  # length of a story in a forecast
# English stories have 1.2 to 1.4 tokens per word under the tokenizers of common models
TOKENS_PER_WORD = 1.4


@dataclass
class Exchange:
    """What is sent to the teacher about one story."""

    number: int  # the story's
    names: tuple[str, ...]  # of the criteria
    fence: str
    messages: list[dict]
    afresh: bool  # whether replies from earlier processes are ignored
    asked: bool = False  # whether a request was made
    deadline: float | None = None  # on the monotonic clock, for all attempts; set by the first


class Teacher(Grader):
    """The teacher at `urls`: one server or several, of one model. A story whose reply holds no
    scores is sent again with another seed, up to `attempts` times. A failure that a retry cannot
    fix (wrong key, exhausted quota, unknown model, too short a context) raises UserError from
    whatever waits for a grade, and no further story is sent.

    models: one for all servers or one each; None: the first one listed. concurrency: requests in
    flight per server. cache: file for replies (cache.py). api_key: by default OPENAI_API_KEY_1, _2
    ... in the order of the URLs, else OPENAI_API_KEY. max_unscored: tolerated fraction (see
    `grades`). price_in, price_out: per million tokens. budget_cost: a request that could exceed it
    is not sent. options: the fields of `Options`."""

    def __init__(
        self,
        urls: str | Sequence[str],
        models: str | Sequence[str] | None = None,
        *,
        concurrency: int = 16,
        cache: str | os.PathLike | None = None,
        api_key: str | None = None,
        max_unscored: float = 1.0,
        price_in: float = 0.0,
        price_out: float = 0.0,
        budget_cost: float | None = None,
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
        self.ledger = Ledger(price_in, price_out, budget_cost, self.cache.tokens)
        self.endpoints: list[Endpoint] = []
        for i, url in enumerate(urls):
            own_key = os.environ.get(f"OPENAI_API_KEY_{i + 1}")
            client = ChatClient(url, api_key or own_key or os.environ.get("OPENAI_API_KEY"))
            model = names[i % len(names)]
            slots = Slots(concurrency)
            self.endpoints.append(Endpoint(url, model, client, slots, self.ledger, self.options))
        self.pool = ServerPool(
            self.endpoints, examine=lambda endpoint: Prober(endpoint, self.cache).examine()
        )
        # after probing: the server whose model and probe are in all cache keys
        self._first: Endpoint | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
        self._thread.start()

    # ---- what a run asks of it -------------------------------------------------------------------

    def send_question(self, question: Question) -> None:
        self.sent[question] = self.submit(question)

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
        then serves even if the server cannot be reached. The first probe is that of `_first`.
        Raises UserError if no server can be reached, or if one has no OpenAI-compatible API, lacks
        the model, refuses the request or does not reply in time."""
        if self._first is None:
            examined = asyncio.run_coroutine_threadsafe(self.pool.examine_all(), self._loop)
            present = examined.result()
            if len({endpoint.model for endpoint in present}) > 1:
                tqdm.write(f"warning: {self.model} are taken for one model")
            self._first = with_oldest_probe(present, self.cache)
        first = self._first.probe
        probes = [endpoint.probe for endpoint in self.endpoints if endpoint.probe is not None]
        probes.sort(key=lambda probe: probe is not first)
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
        names = self.options.template.names
        return max(endpoint.max_tokens(names) for endpoint in self.endpoints)

    @property
    def most_words(self) -> int:
        return self.longest_reply * self.options.attempts  # a word is at least one token

    def affords(self, stories: int) -> bool:
        thoughts = max(endpoint.probe.least_tokens for endpoint in self.endpoints if endpoint.probe)
        requests = stories * self.options.attempts
        tokens_out = requests * max(self.longest_reply, thoughts)
        return self.ledger.affords(requests * self.ledger.largest_in, tokens_out)

    def stats(self) -> dict[str, Any]:
        return {f"teacher_{name}": value for name, value in self.ledger.stats().items()}

    def forecast(self, stories: int, opening: str, together: int = 1) -> str:
        """Estimated from the first probe, for one readable reply per story. The student reads all
        replies."""
        probes = self.probes()
        first = probes[0]
        prompt_tokens: float
        reply_tokens: float
        if first.tokens is not None:
            prompt_tokens, reply_tokens = first.tokens
        else:  # about four characters per token of text, two of digits and spaces
            messages = render(*FIRST_STORY, fence="=", template=self.options.template)
            prompt_tokens = len(str(messages)) / 4
            reply_tokens = len(first.reply) / 2
        opening_words = len(opening.split())
        words = opening_words + together * STORY_WORDS
        more_words = words - len(" ".join(FIRST_STORY).split())  # than the probe's story
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

    async def _grade(self, question: Question, afresh: bool) -> Grade:
        """One story is sent up to `attempts` times. The first reply with scores counts."""
        # After a fatal failure nobody awaits the other tasks, whose failures asyncio would print.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        options = self.options
        template = question.template or options.template
        names = template.names
        if is_blank(question.story):
            return Grade(dict.fromkeys(names, 0), 0.0)  # as the instructions say

        mark = fence(options.seed, question.number, f"{question.opening}\n{question.story}")
        messages = render(question.opening, question.story, fence=mark, template=template)
        exchange = Exchange(question.number, names, mark, messages, afresh)
        scores: Mapping[str, int] | None = None
        error: str | None = None
        replies: list[str] = []
        for attempt in range(options.attempts):
            reply = await self._reply(exchange, attempt)
            error = reply.error
            if error:
                break
            replies.append(reply.text)
            scores = parse_scores(reply.text, names)
            if scores is not None:
                break
        else:
            error = f"no scores in {options.attempts} replies"

        # A word is at least one token. Some servers ignore max_tokens: more words are not used.
        words = sum(min(len(reply.split()), self.longest_reply) for reply in replies)
        return Grade(
            scores,
            score=None if scores is None else template.score(scores),
            reply=replies[-1][:LONGEST_REPLY] if replies else "",
            attempts=len(replies),
            reply_words=words,
            asked=exchange.asked,
            error=error,
        )

    async def _reply(self, exchange: Exchange, attempt: int) -> CachedReply:
        """The reply from the cache, else from a server; then it is cached before it is used."""
        first = self._first
        assert first is not None
        names = exchange.names
        seed = self.options.seed + attempt
        key = first.reply_key(exchange.messages, exchange.fence, seed, names)
        # A failure is kept for this story only, not for an equal one.
        failure_key = f"{key} {exchange.number}"
        earlier = not exchange.afresh
        cached = self.cache.get(failure_key, earlier) or self.cache.get(key, earlier)
        if cached is not None:
            self.ledger.total["cached"] += 1
            return cached

        exchange.asked = True
        chat = functools.partial(Endpoint.chat, messages=exchange.messages, seed=seed, names=names)
        try:
            answer = await self.pool.ask(chat, exchange.deadline)
        except Failure as failure:
            failed = CachedReply("", error=f"the teacher {failure}")
            return self.cache.put(failure_key, failed, again=exchange.afresh)
        exchange.deadline = answer.deadline
        reply = answer.value
        about = {"model": first.model, "attempt": attempt, "tokens": reply.tokens}
        if len(self.endpoints) > 1:
            about["server"] = answer.endpoint.url
        if self.cache.get(failure_key):  # an earlier process's, which this reply replaces
            key = failure_key
        return self.cache.put(key, CachedReply(reply.text), again=exchange.afresh, **about)

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for endpoint in self.endpoints:
            await endpoint.client.close()
