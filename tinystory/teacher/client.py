"""Client of a teacher with an OpenAI-compatible API, on one server or several (pool.py). Its event
loop has a thread of its own, so stories are graded while others are still being written. A failure
is never taken for a score."""

import asyncio
import concurrent.futures
import functools
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from tqdm import tqdm

from tinystory.run.errors import Stop, UserError
from tinystory.run.text import is_blank
from tinystory.teacher.api import ChatClient, Failure
from tinystory.teacher.cache import Cache, CachedReply, cache_key
from tinystory.teacher.endpoint import Endpoint, Options, Probe, Slots, base_url
from tinystory.teacher.grade import Grade, Grader, too_few_scores
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.parse import LONGEST_REPLY, expected_scores, parse_scores
from tinystory.teacher.pool import ServerPool
from tinystory.teacher.probe import FIRST_STORY, Prober, load_probe
from tinystory.teacher.prompt import Question, fence, render

PROBE = "probe "  # prefix of a probe's key in the cache
HUMAN = "human"  # the model's name if a human grades (scripts/teach.py)
PATIENCE_S = 3 * 86_400.0  # time limit for a human
SILENCE_S = 60.0  # seconds of waiting before progress is printed
STORY_WORDS = 80  # length of a story in a forecast
# English stories have 1.2 to 1.4 tokens per word under the tokenizers of common models
TOKENS_PER_WORD = 1.4


@dataclass(eq=False, repr=False)
class Teacher(Options, Grader, AbstractContextManager["Teacher"]):
    """The teacher at `urls`: one server or several, of one model. A story whose reply holds no
    scores is sent again with another seed, up to `attempts` times. A failure that a retry cannot
    fix (wrong key, exhausted quota, unknown model, too short a context) raises UserError from
    whatever waits for a grade, and no further story is sent."""

    urls: str | Sequence[str]
    # one for all servers or one each; None: the first one listed
    models: str | Sequence[str] | None = None
    _: KW_ONLY
    concurrency: int = 16  # requests in flight per server
    cache: str | os.PathLike | None = None  # file for replies (cache.py)
    # default: OPENAI_API_KEY_1, _2 ... in the order of the URLs, else OPENAI_API_KEY
    api_key: str | None = None
    max_unscored: float = 1.0  # tolerated fraction (see `grades`)
    price_in: float = 0.0  # per million tokens
    price_out: float = 0.0
    budget_cost: float | None = None  # a request that could exceed it is not sent

    def __post_init__(self) -> None:
        Grader.__init__(self, {})  # `probes` fills in the facts
        urls = [base_url(url) for url in ([self.urls] if isinstance(self.urls, str) else self.urls)]
        models: Sequence[str | None] = (
            [self.models] if isinstance(self.models, str) else self.models
        ) or [None]
        if len(models) not in (1, len(urls)) or len(set(urls)) < len(urls):
            raise UserError(
                f"name each teacher's URL once, and one model for all or one for each URL: there are {len(models)} "
                f"models and {len(set(urls))} URLs"
            )
        self._extra_json = json.dumps(self.extra, sort_keys=True) if self.extra else ""
        self._cache = Cache(self.cache)
        self.ledger = Ledger(self.price_in, self.price_out, self.budget_cost, self._cache.tokens)
        self.endpoints = []
        for i, url in enumerate(urls):
            key = (
                self.api_key
                or os.environ.get(f"OPENAI_API_KEY_{i + 1}")
                or os.environ.get("OPENAI_API_KEY")
            )
            client, slots, model = (
                ChatClient(url, key),
                Slots(self.concurrency),
                models[i % len(models)],
            )
            self.endpoints.append(Endpoint(url, model, client, slots, self.ledger, self))
        self.pool = ServerPool(self.endpoints, self, self._examine)
        # sent before `grades` asks for them
        self.sent: dict[Question, concurrent.futures.Future[Grade]] = {}
        # after probing: the server whose model and probe are in all cache keys
        self._first: Endpoint | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
        self._thread.start()

    def probes(self) -> list[Probe]:
        """Probe each server once: about four requests, or one if the cache holds the result, which
        then serves even if the server cannot be reached. The first probe is that of `_first`.
        Raises UserError if no server can be reached, or if one has no OpenAI-compatible API, lacks
        the model, refuses the request or does not reply in time."""
        if self._first is None:
            self._first = asyncio.run_coroutine_threadsafe(self._probe(), self._loop).result()
        others = (endpoint for endpoint in self.endpoints if endpoint is not self._first)
        probes = [
            endpoint.probe for endpoint in (self._first, *others) if endpoint.probe is not None
        ]
        if not self.facts:
            scored_by = ", ".join(f"{probe.model} at {probe.url}" for probe in probes)
            self.facts |= {"scored_by": scored_by, "teacher": asdict(probes[0])}
        return probes

    @property
    def model(self) -> str:
        """The model's name, once known; several names if servers call it differently."""
        return ", ".join(
            dict.fromkeys(endpoint.model for endpoint in self.endpoints if endpoint.model)
        )

    @property
    def most_words(self) -> int:
        return self.longest_reply * self.attempts  # a word is at least one token

    @property
    def longest_reply(self) -> int:
        """Upper bound on the tokens of a reply that are used."""
        return max(endpoint.max_tokens(self.template.names) for endpoint in self.endpoints)

    def affords(self, stories: int) -> bool:
        thoughts = max(endpoint.probe.least_tokens for endpoint in self.endpoints if endpoint.probe)
        requests = stories * self.attempts
        return self.ledger.affords(
            requests * self.ledger.largest_in, requests * max(self.longest_reply, thoughts)
        )

    def stats(self) -> dict[str, Any]:
        return {f"teacher_{name}": value for name, value in self.ledger.stats().items()}

    def forecast(self, stories: int, opening: str, together: int = 1) -> str:
        """Estimated from the first probe, for one readable reply per story. The student reads all
        replies."""
        first, *_ = probes = self.probes()
        characters = len(str(render(*FIRST_STORY, fence="=", template=self.template)))
        prompt, reply = first.tokens or (characters / 4, len(first.reply) / 2)
        opening_words = len(opening.split())
        longer = opening_words + together * STORY_WORDS - len(" ".join(FIRST_STORY).split())
        tokens_in, tokens_out = stories * (prompt + longer * TOKENS_PER_WORD), stories * reply
        price = self.ledger.price(tokens_in, tokens_out)
        minutes = stories / sum(self.concurrency / probe.seconds for probe in probes) / 60
        duration = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(minutes, 1):.0f} min"
        return (
            f"{stories:,} stories, {tokens_in:,.0f} prompt tokens and {tokens_out:,.0f} reply tokens, "
            f"{opening_words + stories * len(first.reply.split()):,} words for the student"
            f"{f', cost {price:.2f}' if price else ''}, about {duration} of grading"
        )

    def send(self, index: int, opening: str, story: str, tokens: Sequence[int] = ()) -> None:
        super().send(index, opening, story, tokens)
        self.sent[self.pending[index]] = self.submit(self.pending[index])

    def grades(self, questions: Sequence[Question], stop: Stop | None = None) -> list[Grade]:
        """If too many are unscored, those whose replies came from an earlier process are asked
        about again: the teacher may have been fixed."""
        sent = [
            self.sent.pop(each) if each in self.sent else self.submit(each) for each in questions
        ]
        grades = self._wait(sent, stop)
        if too_few_scores(grades, self.max_unscored):
            old = [i for i, grade in enumerate(grades) if grade.score is None and not grade.asked]
            new = self._wait([self.submit(questions[i], afresh=True) for i in old], stop)
            for i, grade in zip(old, new, strict=True):
                grades[i] = grade
        return grades

    def _wait(
        self, futures: Sequence["concurrent.futures.Future[Grade]"], stop: Stop | None
    ) -> list[Grade]:
        waiting, silent_until = set(futures), time.monotonic() + SILENCE_S
        with tqdm(
            total=len(futures), desc="teacher", unit="story", leave=False, delay=2, disable=None
        ) as bar:
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

    def submit(
        self, question: Question, afresh: bool = False
    ) -> "concurrent.futures.Future[Grade]":
        """Send a story now; returns its future grade. afresh: ignore replies from earlier
        processes."""
        self.probes()
        return asyncio.run_coroutine_threadsafe(self._grade(question, afresh), self._loop)

    def close(self) -> None:
        """Cancel the requests in flight; close the connections and the cache."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._cache.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    # The coroutines below run in the event loop's thread.

    async def _shut(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for endpoint in self.endpoints:
            await endpoint.client.close()

    async def _probe(self) -> Endpoint:
        """Examine all servers; returns the one whose probe is the oldest in the cache."""
        outcomes = await asyncio.gather(*map(self._examine, self.endpoints), return_exceptions=True)
        present = [
            endpoint
            for endpoint, outcome in zip(self.endpoints, outcomes, strict=True)
            if outcome is None
        ]
        for endpoint, outcome in zip(self.endpoints, outcomes, strict=True):
            if isinstance(outcome, Failure) and outcome.unreachable and present:
                self.pool.leave_out(endpoint, outcome)
            elif isinstance(outcome, Failure):
                raise UserError(f"the teacher at {endpoint.url} {outcome}")
            elif outcome is not None:
                raise outcome
        if len({endpoint.model for endpoint in present}) > 1:
            tqdm.write(f"warning: {self.model} are taken for one model")
        keys = {self._probe_key(endpoint.url, endpoint.model): endpoint for endpoint in present}
        return next(keys[key] for key, _ in self._cache.items() if key in keys)

    async def _examine(self, endpoint: Endpoint) -> None:
        """Probe the server, or take its probe from the cache, which also serves while it cannot be
        reached."""
        prober = Prober(ServerPool([endpoint], self, probing=True))
        try:
            await prober.choose_model()
        except Failure as failure:
            kept = self._kept_probe(endpoint)
            if kept is None or not failure.unreachable:
                raise
            endpoint.model, endpoint.probe = kept.model, kept
            tqdm.write(
                f"warning: the teacher at {endpoint.url} {failure}; until then, kept replies will do"
            )
            return
        probe = self._kept_probe(endpoint)
        # A cached probe without scores is repeated, unless the run got scores in spite of it.
        texts = (reply.text for _, reply in self._cache.items())
        if probe is None or not (
            probe.scored or any(parse_scores(text, self.template.names) for text in texts)
        ):
            probe = await prober.probe()
            reply = CachedReply(json.dumps(asdict(probe)))
            self._cache.put(self._probe_key(endpoint.url, endpoint.model), reply, again=True)
        endpoint.probe = probe
        if endpoint.model == HUMAN:  # a human may take a break
            self.deadline_s = endpoint.slots.shortest = PATIENCE_S

    def _kept_probe(self, endpoint: Endpoint) -> Probe | None:
        """The newest cached probe of this server that was made with the current options."""
        for key, reply in reversed([*self._cache.items()]):
            if not key.startswith(PROBE):
                continue
            probe = load_probe(reply.text, endpoint.url)
            if (
                probe is not None
                and key == self._probe_key(endpoint.url, probe.model)
                and endpoint.model in (None, probe.model)
            ):
                return probe
        return None

    def _probe_key(self, url: str, model: str | None) -> str:
        text = f"{url} {model} {self.max_tokens} {self.temperature} {self.logprobs} {self.template}{self._extra_json}"
        return PROBE + hashlib.sha256(text.encode()).hexdigest()[:24]

    async def _grade(self, question: Question, afresh: bool) -> Grade:
        """Take each attempt's reply from the cache, or ask for it and cache it; then parse it."""
        # After a fatal failure the other tasks are not awaited: keep asyncio from reporting their
        # exceptions.
        task, first, cache = asyncio.current_task(), self._first, self._cache
        assert (
            task is not None
            and first is not None
            and first.model is not None
            and first.probe is not None
        )
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        opening, story, number = question.opening, question.story, question.number
        template = question.template or self.template
        names = template.names
        if is_blank(story):
            return Grade(dict.fromkeys(names, 0), 0.0)  # as the instructions say
        mark = fence(self.seed, number, f"{opening}\n{story}")
        messages = render(opening, story, fence=mark, template=template)
        asked_as = {"held_to": first.probe.held_to} | (
            {"extra": self._extra_json} if self.extra else {}
        )
        scores: Mapping[str, float] | None = None
        replies: list[str] = []
        error: str | None = None
        deadline: float | None = None
        asked = False
        for attempt in range(self.attempts):
            seed = self.seed + attempt
            key = cache_key(first.model, messages, mark, first.sampling(seed, names) | asked_as)
            # a failure is kept for this story only, not for an equal one
            given_up = f"{key} {number}"
            if kept := cache.get(given_up, earlier=not afresh) or cache.get(
                key, earlier=not afresh
            ):
                self.ledger.total["cached"] += 1
            else:
                asked = True
                request = functools.partial(
                    Endpoint.chat, messages=messages, seed=seed, names=names
                )
                try:
                    reply, server, deadline = await self.pool.ask(request, deadline)
                except Failure as failure:
                    kept = cache.put(
                        given_up, CachedReply("", error=f"the teacher {failure}"), again=afresh
                    )
                else:
                    expected = (
                        expected_scores(reply.text, names, reply.logprobs)
                        if self.logprobs
                        else None
                    )
                    about = {"model": first.model, "attempt": attempt, "tokens": reply.tokens}
                    about |= {"server": server.url} if len(self.endpoints) > 1 else {}
                    where = given_up if cache.get(given_up) else key
                    kept = cache.put(
                        where, CachedReply(reply.text, expected), again=afresh, **about
                    )
            if error := kept.error:
                break
            replies.append(kept.text)
            if not self.logprobs:
                scores = parse_scores(kept.text, names)
            elif kept.expected is not None and kept.expected.keys() == set(names):
                scores = kept.expected
            if scores is not None:
                break
        else:
            error = f"no scores in {self.attempts} replies"
        # A word is at least one token. Some servers ignore max_tokens; words beyond it are not
        # used.
        words = sum(min(len(reply.split()), self.longest_reply) for reply in replies)
        score = None if scores is None else template.score(scores)
        return Grade(
            scores, score, (replies or [""])[-1][:LONGEST_REPLY], len(replies), words, asked, error
        )
