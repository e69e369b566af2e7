"""Grades stories with a model on one or several servers with an OpenAI-compatible API. The requests
run in a separate thread, so stories are graded while the student still writes others.
`Teacher._grade` has all that happens to one story. A failure never becomes a score."""

import asyncio
import concurrent.futures
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tqdm import tqdm

from tinystory.run.errors import Stop, UserError
from tinystory.run.text import is_blank
from tinystory.teacher.api import ChatClient, Failure
from tinystory.teacher.cache import Cache, CachedReply
from tinystory.teacher.endpoint import Endpoint, Options, Probe, base_url
from tinystory.teacher.grade import LONGEST_REPLY, Grade, Grader, Submission, too_few_scores
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.pool import ServerPool, leave_out
from tinystory.teacher.probe import FIRST_STORY, HUMAN, HUMAN_S, Prober
from tinystory.teacher.prompt import fence

MEASURED = 16  # minimum number of requests by which the rate of answers is measured
SILENCE_S = 60.0  # seconds of waiting before progress is printed
STORY_WORDS = 80  # assumed length of a story in a forecast
# English stories have 1.2 to 1.4 tokens per word with the tokenizers of common models.
TOKENS_PER_WORD = 1.4


@dataclass(eq=False)
class _Request:
    """A request about a story. name: of the request, by the protocol. draw: number of the request
    among equal requests, which have different seeds. key: key of the reply in the cache."""

    name: str
    draw: int
    messages: list[dict]
    seed: int
    key: str


@dataclass(eq=False)
class _Story:
    """State of a story that is being graded. last: (name of a request, draw) -> last reply."""

    submission: Submission
    afresh: bool
    asked: bool = False
    error: str | None = None
    replies: list[str] = field(default_factory=list)
    last: dict[tuple[str, int], CachedReply] = field(default_factory=dict)

    def add(self, request: _Request, reply: CachedReply) -> None:
        """Record a reply to a request about this story."""
        if reply.error is not None:
            self.error = reply.error
            return
        self.replies.append(reply.text)
        self.last[request.name, request.draw] = reply


class Teacher(Grader):
    """A grader that asks one model on one or several servers. If a reply has no scores, the request
    is sent again with another seed, up to `attempts` times. After a failure that a retry cannot fix
    (wrong key, exhausted quota, unknown model, too short a context), every call that waits for a
    grade raises UserError, and no further story is sent.

    urls: one URL per server; keys are OPENAI_API_KEY_1, _2, ... in this order, else OPENAI_API_KEY.
    models: one name for all servers or one per server; None: the first model that a server lists.
    concurrency: maximum number of requests in flight per server.
    cache: file for replies (cache.py).
    max_unscored: tolerated fraction of stories without a score (see `grades`).
    price_in, price_out: prices per million tokens.
    budget_cost: a request that could exceed this cost is not sent; 0: no limit.
    options: fields of `Options`."""

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
        self.options = Options(**options)
        role = self.options.role
        urls = [base_url(url, role) for url in ([urls] if isinstance(urls, str) else urls)]
        names: Sequence[str | None] = [models] if isinstance(models, str) else models or [None]
        if len(names) not in (1, len(urls)) or len(set(urls)) < len(urls):
            raise UserError(
                f"{len(urls)} URLs, {len(set(urls))} of them different, and {len(names)} models do not match: give "
                "each --teacher-url once, and one --teacher-model for all URLs or one for each"
            )
        self.per_second = 0.0  # measured rate of answers; 0 until there are enough
        self.concurrency = concurrency
        self.max_unscored = max_unscored
        self.cache = Cache(cache)
        self.ledger = Ledger(price_in, price_out, budget_cost, self.cache.charged)
        self.endpoints: list[Endpoint] = []
        for i, url in enumerate(urls):
            own_key = os.environ.get(f"OPENAI_API_KEY_{i + 1}")
            client = ChatClient(url, own_key or os.environ.get("OPENAI_API_KEY", ""), role)
            model = names[i % len(names)]
            endpoint = Endpoint(url, model, client, concurrency, self.ledger, self.options)
            self.endpoints.append(endpoint)
        self.pool = ServerPool(self.endpoints)
        self._fatal: UserError | None = None  # once set, no further story can be graded
        # The endpoints that were probed. Model and probe of the first one are part of all cache
        # keys.
        self._present: list[Endpoint] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
        self._thread.start()

    # ---- called by a run -------------------------------------------------------------------------

    def submit(self, submission: Submission, afresh: bool = False) -> Future[Grade]:
        """The future grade of a story, which is sent at once. afresh: ignore replies from earlier
        processes."""
        self.probes()
        return asyncio.run_coroutine_threadsafe(self._grade(submission, afresh), self._loop)

    def grades(self, submissions: Sequence[Submission], stop: Stop | None = None) -> list[Grade]:
        """Grades of the submissions, in order. If too many stories have no score, requests are
        repeated for the unscored stories with replies from an earlier process, because the user may
        have fixed the teacher since then."""
        are_all_new = not self.sent
        began, before = self._loop.time(), self.ledger.total["requests"]
        futures = [self.sent.pop(each, None) or self.submit(each) for each in submissions]
        grades = self._wait(futures, stop)
        requests = self.ledger.total["requests"] - before
        if are_all_new and requests >= MEASURED:
            self.per_second = requests / (self._loop.time() - began)
        if too_few_scores(grades, self.max_unscored):
            old = [i for i, grade in enumerate(grades) if grade.score is None and not grade.asked]
            futures = [self.submit(submissions[i], afresh=True) for i in old]
            for i, grade in zip(old, self._wait(futures, stop), strict=True):
                grades[i] = grade
        return grades

    def _wait(self, futures: Sequence[Future[Grade]], stop: Stop | None) -> list[Grade]:
        """The results of the futures. Prints progress. Raises Interrupted on `stop`."""
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
        """The probes of all servers that can be reached. The first call probes each server, with
        about four requests, or with one request if the cache has a probe. A cached probe is used
        even if the server cannot be reached. The first probe is part of all cache keys. Raises
        UserError if no server can be reached, or if a server has no OpenAI-compatible API, lacks
        the model, refuses the request or does not reply in time."""
        if not self._present:
            asyncio.run_coroutine_threadsafe(self._probe_all(), self._loop).result()
            kept = [key for key, _ in self.cache.items()]

            def order(endpoint: Endpoint) -> tuple[bool, bool, int]:
                """The servers of earlier processes first, then those with log-probabilities."""
                is_new = self.cache.get(endpoint.probe_key, earlier=False) is not None
                return is_new, not endpoint.by_logprobs, kept.index(endpoint.probe_key)

            present = [endpoint for endpoint in self.endpoints if endpoint.probe]
            first, *others = sorted(present, key=order)
            self._present = [first]
            for endpoint in others:
                if endpoint.by_logprobs == first.by_logprobs:
                    self._present.append(endpoint)
                else:  # its answers cannot be compared
                    gives = "gives" if endpoint.by_logprobs else "gives no"
                    leave_out(endpoint, Failure(f"{gives} log-probabilities, unlike {first.url}"))
            if len({endpoint.model for endpoint in present}) > 1:
                tqdm.write(
                    f"warning: the servers' models have different names ({self.model}) and are treated as one model"
                )
        probes = [endpoint.probe for endpoint in self._present if endpoint.probe]
        if not self.facts:
            scored_by = ", ".join(f"{probe.model} at {probe.url}" for probe in probes)
            criteria = self.options.protocol.criteria
            self.facts |= {
                "scored_by": scored_by,
                "teacher": asdict(probes[0]),
                "questions": {criterion.name: criterion.question for criterion in criteria},
            }
        return probes

    @property
    def model(self) -> str:
        """The name of the model; "" until it is known; several names, joined by ", ", if the
        servers use different names."""
        names = dict.fromkeys(endpoint.model for endpoint in self.endpoints)
        return ", ".join(name for name in names if name)

    @property
    def longest_reply(self) -> int:
        """Upper bound on the number of tokens of a reply that are used."""
        return max(endpoint.max_tokens for endpoint in self.endpoints)

    @property
    def requests_per_story(self) -> int:
        """Number of requests per story if every reply is readable."""
        return len(self._requests(Submission(*FIRST_STORY, number=0), attempt=0))

    @property
    def most_words(self) -> int:
        self.probes()
        replies = self.requests_per_story * self._present[0].attempts
        return self.longest_reply * replies  # a word is at least one token

    def affords(self, stories: int) -> bool:
        thoughts = max(probe.least_tokens for probe in self.probes())
        requests = stories * self.requests_per_story * self._present[0].attempts
        tokens_out = requests * max(self.longest_reply, thoughts)
        return self.ledger.affords(requests * self.ledger.largest_in, tokens_out)

    def stats(self) -> dict[str, Any]:
        return {f"teacher_{name}": value for name, value in self.ledger.stats().items()}

    def forecast(self, stories: int, opening: str) -> str:
        """One sentence on the cost of grading `stories` stories, estimated from the first probe.
        Assumes one readable reply per request. All replies count as words for the student."""
        probes = self.probes()
        first = probes[0]
        requests = stories * self.requests_per_story
        if first.model == HUMAN:
            return f"{stories:,} stories, about {requests * HUMAN_S / 60:.0f} min of grading"
        submission = Submission(*FIRST_STORY, number=0)
        messages = self._requests(submission, attempt=0)[0].messages
        # without counts by the server: about four characters per token of the prompt, and two per
        # token of a reply, which has digits and spaces
        estimate = len(str(messages)) / 4, len(first.reply) / 2
        prompt_tokens, reply_tokens = first.tokens or estimate
        opening_words = len(opening.split())
        probed_words = len(" ".join(FIRST_STORY).split())
        more_words = opening_words + STORY_WORDS - probed_words
        prompts = requests // self._present[0].draws if first.choices else requests
        tokens_in = prompts * (prompt_tokens + more_words * TOKENS_PER_WORD)
        tokens_out = requests * reply_tokens
        words_in = opening_words + requests * len(first.reply.split())
        price = self.ledger.price(tokens_in, tokens_out)
        cost = f", cost {price:.2f}" if price else ""
        # the probe had two requests in flight; with more, the server may be faster
        per_second = sum(1 / probe.seconds for probe in probes)
        bound = "at most"
        if self.per_second:
            per_second = self.per_second
            bound = "about"
        if self.options.per_minute:
            per_second = min(per_second, self.options.per_minute / 60 * len(probes))
        minutes = prompts / per_second / 60
        duration = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(minutes, 1):.0f} min"
        return (
            f"{stories:,} stories, {tokens_in:,.0f} prompt tokens and {tokens_out:,.0f} reply tokens, "
            f"{words_in:,} words for the student{cost}, {bound} {duration} of grading"
        )

    def close(self) -> None:
        """Cancel all requests in flight, and close the connections and the cache."""
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
        """Probe all servers. Leaves out servers that cannot be reached; raises UserError if no
        server can be reached."""
        probers = [Prober(endpoint, self.cache).examine() for endpoint in self.endpoints]
        failures = await asyncio.gather(*probers)
        for endpoint, failure in zip(self.endpoints, failures, strict=True):
            if failure is None:
                continue
            if all(failures):
                raise UserError(f"{endpoint} {failure}")
            leave_out(endpoint, failure)

    async def _grade(self, submission: Submission, afresh: bool) -> Grade:
        """The grade of one story. Each request about the story is sent up to `attempts` times,
        until the reply is readable."""
        # After a fatal failure the other tasks are not awaited. The callback retrieves their
        # exceptions; otherwise asyncio would print them.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        protocol = self.options.protocol
        if is_blank(submission.story):
            return Grade(dict.fromkeys(protocol.names, 0), 0.0)  # as the instructions demand

        story = _Story(submission, afresh)
        by_logprobs = self._present[0].by_logprobs
        read: set[tuple[str, int]] = set()
        for attempt in range(self._present[0].attempts):
            requests = self._requests(submission, attempt)
            unread = [each for each in requests if (each.name, each.draw) not in read]
            await self._ask(story, unread)
            if story.error is not None:
                return self._without_score(story, story.error)
            read = {
                each for each, reply in story.last.items() if protocol.reads(reply, by_logprobs)
            }
            if len(read) == len(requests):
                return self._with_score(story)
        return self._without_score(story, f"no score in {len(story.replies)} replies")

    def _requests(self, submission: Submission, attempt: int) -> list["_Request"]:
        """The requests about a story: those of the protocol, `draws` times each. Seeds differ
        between attempts."""
        options = self.options
        first = self._present[0]
        mark = fence(options.seed, submission.number, f"{submission.opening}\n{submission.story}")
        messages_by_name = options.protocol.messages(submission.opening, submission.story, mark)
        requests = []
        for name, messages in messages_by_name.items():
            for draw in range(first.draws):
                seed = options.seed + draw * options.attempts + attempt
                key = first.reply_key(messages, mark, seed)
                requests.append(_Request(name, draw, messages, seed, key))
        return requests

    async def _ask(self, story: "_Story", requests: Sequence["_Request"]) -> None:
        """Add the replies to these requests to the story. Each reply is cached before it is used.
        Requests without a cached reply are sent one after the other in one slot, so that a server
        with a prefix cache processes the story once. Stops at the first failure, which becomes
        `story.error`."""
        missing = []
        for request in requests:
            kept = self.cache.find(request.key, story.submission.number, earlier=not story.afresh)
            if kept is None:
                missing.append(request)
                continue
            self.ledger.total["cached"] += 1
            story.add(request, kept)

        async def send_missing(endpoint: Endpoint) -> AsyncIterator[None]:
            while missing:
                if self._fatal is not None:
                    raise self._fatal
                request = missing[0]
                together = [request]
                if endpoint.probe and endpoint.probe.choices:
                    together = [each for each in missing if each.name == request.name]
                replies = await endpoint.chat(request.messages, request.seed, len(together))
                for each, reply in zip(together, replies, strict=False):
                    keep(each, CachedReply.of(reply), tokens=reply.tokens)
                yield

        def keep(request: _Request, reply: CachedReply, **about: object) -> None:
            about["charged"] = self.ledger.charged
            kept = self.cache.keep(
                request.key, story.submission.number, reply, again=story.afresh, **about
            )
            story.add(request, kept)
            missing.remove(request)

        if not missing or story.error is not None:
            return
        story.asked = True
        try:
            await self.pool.ask(send_missing)
        except Failure as failure:
            if failure.fatal or failure.unreachable:  # no other story can be graded either
                self._fatal = UserError(f"the {self.options.role} at {failure.url} {failure}")
                raise self._fatal from None
            keep(missing[0], CachedReply("", error=f"the {self.options.role} {failure}"))

    def _with_score(self, story: "_Story") -> Grade:
        """The grade of a story. All last replies of the story must be readable."""
        replies: dict[str, list[CachedReply]] = {}
        for (name, _), reply in story.last.items():
            replies.setdefault(name, []).append(reply)
        grade = self.options.protocol.grade(story.submission, replies)
        return self._with_counts(story, grade)

    def _without_score(self, story: "_Story", error: str) -> Grade:
        return self._with_counts(story, Grade(None, None, error=error))

    def _with_counts(self, story: "_Story", grade: Grade) -> Grade:
        """The grade with the story's replies and their number."""
        # A word is at least one token, so a reply has at most longest_reply words. Some servers
        # ignore max_tokens and send more words; the additional words are not used and not counted.
        words = sum(min(len(text.split()), self.longest_reply) for text in story.replies)
        last = " ".join(reply.text for reply in story.last.values())
        return replace(
            grade,
            reply=last[:LONGEST_REPLY],
            attempts=len(story.replies),
            reply_words=words,
            asked=story.asked,
        )

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for endpoint in self.endpoints:
            await endpoint.client.close()
