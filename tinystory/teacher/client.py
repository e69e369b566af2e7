"""Grades stories with a model on one or several servers with an OpenAI-compatible API. The requests
run in a separate thread, so stories are graded while the student still writes others.
`Teacher._grade` has all that happens to one story. A failure never becomes a score."""

import asyncio
import concurrent.futures
import math
import os
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from tqdm import tqdm

from tinystory.run.errors import Stop, UserError
from tinystory.run.text import is_blank
from tinystory.teacher.api import ChatClient, Failure, Reply
from tinystory.teacher.cache import Cache, cache_key
from tinystory.teacher.endpoint import ATTEMPTS, HUMAN, Endpoint, Options, Probe, base_url
from tinystory.teacher.grade import LONGEST_REPLY, Grade, Grader, Submission, too_few_scores
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.pool import ServerPool, leave_out
from tinystory.teacher.probe import FIRST_STORY, Prober
from tinystory.teacher.prompt import fence

T = TypeVar("T")
MEASURED = 16  # minimum number of requests by which the rate of answers is measured
SILENCE_S = 60.0  # seconds of waiting before progress is printed
STORY_WORDS = 80  # assumed length of a story in a forecast
# English stories have 1.2 to 1.4 tokens per word with the tokenizers of common models.
TOKENS_PER_WORD = 1.4


@dataclass(eq=False)
class _Request:
    """A request about a story. place: (the protocol's name of the request, number of the request
    among equal requests, which have different seeds). key: key of the reply in the cache."""

    place: tuple[str, int]
    messages: list[dict]
    seed: int
    key: str


class Teacher(Grader):
    """A grader that asks one model on one or several servers. If a reply has no scores, the request
    is sent again with another seed, up to `attempts` times. After a failure that a retry cannot fix
    (wrong key, exhausted quota, unknown model, too short a context), every call that waits for a
    grade raises UserError, and no further story is sent.

    urls: one URL per server; keys are OPENAI_API_KEY_1, _2, ... in this order (of a judge:
    OPENAI_API_KEY_JUDGE), else OPENAI_API_KEY.
    models: one name for all servers or one per server; none: the first model that a server lists.
    concurrency: maximum number of requests in flight per server.
    cache: file for replies (cache.py).
    max_unscored: tolerated fraction of stories without a score (see `grades`).
    price_in, price_out: prices per million tokens.
    budget_cost: a request that could exceed this cost is not sent; 0: no limit.
    options: fields of `Options`."""

    def __init__(
        self,
        urls: Sequence[str],
        models: Sequence[str] = (),
        *,
        concurrency: int = 16,
        cache: str | os.PathLike | None = None,
        max_unscored: float = 1.0,
        price_in: float = 0.0,
        price_out: float = 0.0,
        budget_cost: float = 0.0,
        **options: Any,
    ):
        self.options = Options(**options)
        role = self.options.role
        urls = [base_url(url, role) for url in urls]
        names = models or [""]
        if len(names) not in (1, len(urls)) or len(set(urls)) < len(urls):
            raise UserError(
                f"{len(urls)} URLs, {len(set(urls))} of them different, and {len(names)} models do not match: give "
                "each --teacher-url once, and one --teacher-model for all URLs or one for each"
            )
        self.per_second = 0.0  # measured rate of answers; 0 until there are enough
        self.max_unscored = max_unscored
        self.cache = Cache(cache)
        self.ledger = Ledger(price_in, price_out, budget_cost, self.cache.charged)
        self.endpoints: list[Endpoint] = []
        for i, url in enumerate(urls):
            key_name = f"OPENAI_API_KEY_{'JUDGE' if role == 'judge' else i + 1}"
            if not os.environ.get(key_name):
                key_name = "OPENAI_API_KEY"
            client = ChatClient(url, os.environ.get(key_name, ""), role, key_name)
            named = Probe(url=url, model=names[i % len(names)])
            endpoint = Endpoint(named, client, concurrency, self.ledger, self.options)
            self.endpoints.append(endpoint)
        self.pool = ServerPool(self.endpoints)
        self._fatal: UserError | None = None  # once set, no further story can be graded
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
        self._thread.start()
        try:
            self.present = self._run(self._probe_all())
        except BaseException:
            self.close()
            raise
        # All servers are asked in the same way. The first one's model is part of all cache keys.
        self.probes = [endpoint.probe for endpoint in self.present]
        self.by_logprobs = self.present[0].by_logprobs
        self.draws = 1 if self.by_logprobs else self.options.protocol.draws
        self.attempts = 1 if self.by_logprobs else ATTEMPTS
        self.requests_per_story = len(self._requests(Submission(*FIRST_STORY, 0), attempt=0))
        criteria = self.options.protocol.criteria
        super().__init__(
            {
                "scored_by": ", ".join(f"{probe.model} at {probe.url}" for probe in self.probes),
                "teacher": asdict(self.probes[0]),
                "questions": {criterion.name: criterion.question for criterion in criteria},
            }
        )

    # ---- called by a run -------------------------------------------------------------------------

    def submit(self, submission: Submission) -> Future[Grade]:
        """The future grade of a story, which is sent at once."""
        return asyncio.run_coroutine_threadsafe(self._grade(submission), self._loop)

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
            unscored = [i for i, grade in enumerate(grades) if grade.score is None]
            old = [i for i in unscored if self._forget_replies(submissions[i])]
            futures = [self.submit(submissions[i]) for i in old]
            for i, grade in zip(old, self._wait(futures, stop), strict=True):
                grades[i] = grade
        return grades

    def _forget_replies(self, submission: Submission) -> bool:
        """Whether the cache had replies about a story from an earlier process."""
        forgotten = False
        for attempt in range(self.attempts):
            for request in self._requests(submission, attempt):
                forgotten |= self.cache.forget(request.key)
        return forgotten

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

    @property
    def model(self) -> str:
        """The name of the model in its last reply; several names, joined by ", ", if the servers
        use different names."""
        return ", ".join(dict.fromkeys(endpoint.taught_by for endpoint in self.present))

    @property
    def longest_reply(self) -> int:
        """Upper bound on the number of tokens of a reply that are used."""
        return max(endpoint.max_tokens for endpoint in self.endpoints)

    @property
    def most_words(self) -> int:
        # a word is at least one token
        return self.longest_reply * self.requests_per_story * self.attempts

    def affords(self, stories: int) -> bool:
        thoughts = max(probe.least_tokens for probe in self.probes)
        requests = stories * self.requests_per_story * self.attempts
        tokens_out = requests * max(self.longest_reply, thoughts)
        return self.ledger.affords(requests * self.ledger.largest_in, tokens_out)

    def stats(self) -> dict[str, Any]:
        return {f"teacher_{name}": value for name, value in self.ledger.stats().items()}

    def forecast(self, stories: int, opening: str) -> str:
        """One sentence on the cost of grading `stories` stories, estimated from the first probe.
        Assumes one readable reply per request. All replies count as words for the student."""
        first = self.probes[0]
        requests = stories * self.requests_per_story
        prompts = requests // self.draws if first.choices else requests
        # the probe had two requests in flight; with more, the server may be faster
        bound = "about" if self.per_second else "at most"
        per_second = self.per_second or sum(1 / probe.seconds for probe in self.probes)
        minutes = prompts / per_second / 60
        duration = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(minutes, 1):.0f} min"
        if first.model == HUMAN:
            return f"{stories:,} stories, about {duration} of grading"
        # without counts by the server: about four characters per token of the prompt, and two per
        # token of a reply, which has digits and spaces
        messages = self._requests(Submission(*FIRST_STORY, 0), attempt=0)[0].messages
        estimate = len(str(messages)) / 4, len(first.reply) / 2
        prompt_tokens, reply_tokens = first.tokens or estimate
        opening_words = len(opening.split())
        more_words = opening_words + STORY_WORDS - len(" ".join(FIRST_STORY).split())
        tokens_in = prompts * (prompt_tokens + more_words * TOKENS_PER_WORD)
        # the probe counted all replies to a prompt
        tokens_out = (prompts if first.choices and first.tokens else requests) * reply_tokens
        words_in = opening_words + requests * len(first.reply.split())
        price = self.ledger.price(tokens_in, tokens_out)
        cost = f", cost {price:.2f}" if price else ""
        return (
            f"{stories:,} stories, {tokens_in:,.0f} prompt tokens and {tokens_out:,.0f} reply tokens, "
            f"{words_in:,} words for the student{cost}, {bound} {duration} of grading"
        )

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine that runs in the thread of the requests."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        """Cancel all requests in flight, and close the connections and the cache."""
        if self._loop.is_closed():
            return
        self._run(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.cache.close()

    def __enter__(self) -> "Teacher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- in the thread of the requests -----------------------------------------------------------

    async def _probe_all(self) -> list[Endpoint]:
        """The servers that can be asked, after probing all servers with about four requests each,
        or one request if the cache has a probe. Leaves out servers that cannot be reached, and
        servers without log-probabilities beside servers that have them. Raises UserError if no
        server can be reached, or if a server has no OpenAI-compatible API, lacks the model, refuses
        the request or does not reply in time."""
        probers = [Prober(endpoint, self.cache).examine() for endpoint in self.endpoints]
        failures = await asyncio.gather(*probers)
        for endpoint, failure in zip(self.endpoints, failures, strict=True):
            if failure is None:
                continue
            if all(failures):
                raise UserError(f"{endpoint} {failure}")
            leave_out(endpoint, failure)
        present = [endpoint for endpoint in self.endpoints if endpoint.is_open]
        by_logprobs = any(endpoint.by_logprobs for endpoint in present)
        for endpoint in present:
            if endpoint.by_logprobs != by_logprobs:
                leave_out(endpoint, Failure("gives no log-probabilities, unlike another server"))
        return [endpoint for endpoint in present if endpoint.is_open]

    async def _grade(self, submission: Submission) -> Grade:
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

        read: dict[tuple[str, int], Reply] = {}
        texts: list[str] = []
        error = None
        for attempt in range(self.attempts):
            requests = self._requests(submission, attempt)
            replies = await self._replies([each for each in requests if each.place not in read])
            for place, reply in replies.items():
                if reply.error:
                    error = reply.error
                    continue
                texts.append(reply.text)
                if protocol.reads(reply):
                    read[place] = reply
            if error or len(read) == len(requests):
                break
        else:
            error = f"no score in {len(texts)} replies"

        grade = Grade(None, None, error=error)
        if error is None:
            by_name: dict[str, list[Reply]] = {}
            for (name, _), reply in read.items():
                by_name.setdefault(name, []).append(reply)
            grade = protocol.grade(submission, by_name)
        # A word is at least one token, so a reply has at most longest_reply words. Some servers
        # ignore max_tokens and send more words; the additional words are not used and not counted.
        words = sum(min(len(text.split()), self.longest_reply) for text in texts)
        last = " ".join(texts[-self.requests_per_story :])[:LONGEST_REPLY]
        return replace(grade, reply=last, reply_words=words)

    def _requests(self, submission: Submission, attempt: int) -> list["_Request"]:
        """The requests about a story: those of the protocol, `draws` times each. Seeds differ
        between attempts."""
        options = self.options
        mark = fence(options.seed, submission.number, f"{submission.opening}\n{submission.story}")
        messages_by_name = options.protocol.messages(submission.opening, submission.story, mark)
        determined_by = {
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
            "extra": options.extra,
            "logprobs": self.by_logprobs,
        }
        requests = []
        for name, messages in messages_by_name.items():
            for draw in range(self.draws):
                seed = options.seed + draw * ATTEMPTS + attempt
                sampling = determined_by | {"seed": seed}
                key = cache_key(self.probes[0].taught_by, messages, mark, sampling)
                requests.append(_Request((name, draw), messages, seed, key))
        return requests

    async def _replies(self, requests: Sequence["_Request"]) -> dict[tuple[str, int], Reply]:
        """Replies to requests about one story, by place. Each reply is cached before it is used.
        Requests without a cached reply are sent one after the other in one slot, so that a server
        with a prefix cache processes the story once. Stops at the first failure: a reply with an
        error."""
        replies: dict[tuple[str, int], Reply] = {}
        missing: list[_Request] = []
        for request in requests:
            cached = self.cache.get(request.key)
            if cached is None:
                missing.append(request)
                continue
            self.ledger.total["cached"] += 1
            replies[request.place] = cached

        def keep(request: _Request, reply: Reply) -> None:
            replies[request.place] = self.cache.put(request.key, reply, self.ledger.charged)
            missing.remove(request)

        async def send_missing(endpoint: Endpoint) -> AsyncIterator[None]:
            while missing:
                if self._fatal is not None:
                    raise self._fatal
                first = missing[0]
                together = [first]
                if endpoint.probe.choices:
                    together = [each for each in missing if each.place[0] == first.place[0]]
                sent = await endpoint.chat(first.messages, first.seed, len(together))
                for request, reply in zip(together, sent, strict=False):
                    keep(request, reply)
                yield

        if not missing or any(reply.error for reply in replies.values()):
            return replies
        try:
            await self.pool.ask(send_missing)
        except Failure as failure:
            if failure.fatal:  # no other story can be graded either
                self._fatal = UserError(f"the {self.options.role} at {failure.url} {failure}")
                raise self._fatal from None
            keep(missing[0], Reply("", error=f"the {self.options.role} {failure}"))
        return replies

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for endpoint in self.endpoints:
            await endpoint.client.close()
