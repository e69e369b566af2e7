"""The teacher's client: any server with OpenAI's chat completions can grade, and no failure of it is taken for a score.

An event loop in its own thread sends the stories, so some are graded while others are still being written. Every story
ends either with scores that the teacher gave or with none. Several servers of one model share the stories (judge.py);
different models are a panel, each of which grades every story.
"""

import asyncio
import concurrent.futures
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from tinystory.run.errors import UserError
from tinystory.teacher import probe as probing
from tinystory.teacher.api import Failure, Reply
from tinystory.teacher.cache import Cache, Kept, cache_key
from tinystory.teacher.endpoint import Endpoint, base_url
from tinystory.teacher.grade import Grade, expected_scores, grade_if_empty, grade_of, panel_grade, parse_scores
from tinystory.teacher.judge import Judge, Question, Terms
from tinystory.teacher.ledger import Ledger
from tinystory.teacher.probe import Form, Probe
from tinystory.teacher.prompt import Template, fence, render

T = TypeVar("T")
FIRST_STORY = "Once upon a time,", "a cat sat down by the fire and slept."  # the probe's opening and story
PERSON = "person"  # the model of a server behind which a person grades (scripts/teach.py)
PATIENCE_S = 3 * 86_400.0
STORY_WORDS = 80  # length of a story in a forecast
TOKENS_PER_WORD = 1.4  # English stories have 1.2 to 1.4 tokens per word under the tokenizers of common models


class Teacher:
    """A client of the teacher at `url`, with at most `concurrency` requests in flight per server.

    url, model: one, or several; without `panel` ("mean" or "median") all serve the same model, and with it every model
    grades every story. One model is asked for at every URL, several each at its own.

    A story's requests all end within `deadline_s` seconds of its first; the timeout of each is deadline_s / attempts,
    or less once the server's speed is known (see `Slots.timeout`). If a reply holds no scores, the story is sent again
    with another seed, up to `attempts` times. With `logprobs`, scores are expected values (see `expected_scores`), and
    a reply without the log-probabilities that they need holds none. cache: path of the file that keeps every reply (see
    cache.py). api_key: default OPENAI_API_KEY_1, _2 ... in the order of the URLs, or else OPENAI_API_KEY; local servers
    need none. extra: fields that are merged into every request. template: what is graded. Prices are per million
    tokens, and no request is sent that could take the cost beyond `budget_cost`.

    A failure that a retry cannot fix (a refused key, an exhausted quota, an unknown model, a story too long for the
    model's context) raises UserError from whatever waits for a grade, and no further story is sent.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        model: str | Sequence[str] | None = None,
        *,
        panel: str = "",
        concurrency: int = 16,
        temperature: float = 0.2,
        seed: int = 0,
        max_tokens: int = 16,
        deadline_s: float = 300.0,
        attempts: int = 3,
        cache: str | os.PathLike | None = None,
        api_key: str | None = None,
        extra: Mapping[str, Any] | None = None,
        template: Template = Template(),  # noqa: B008 - frozen
        logprobs: bool = False,
        price_in: float = 0.0,
        price_out: float = 0.0,
        budget_cost: float | None = None,
    ):
        urls = [base_url(each) for each in ([url] if isinstance(url, str) else url)]
        named = [model] if isinstance(model, str) else model
        models: list[str | None] = [*named] if named else [None]
        if len(models) not in (1, len(urls)):
            raise UserError(f"{len(models)} models were named for {len(urls)} teachers: name one, or one for each URL")
        if len(set(urls)) < len(urls) and not panel:
            raise UserError("one URL was given twice: name each server once")
        self.template, self.logprobs, self.panel, self.extra = template, logprobs, panel, dict(extra or {})
        self.temperature, self.seed, self.attempts = temperature, seed, attempts
        self.ledger = Ledger(price_in, price_out, budget_cost, urls)
        self._terms = Terms(deadline_s, attempts, self.ledger)
        self.endpoints = [
            Endpoint(
                each,
                models[i % len(models)],
                api_key or os.environ.get(f"OPENAI_API_KEY_{i + 1}") or os.environ.get("OPENAI_API_KEY"),
                timeout_s=deadline_s / attempts,
                concurrency=concurrency,
                max_tokens=max_tokens,
                names=template.names,
                extra=self.extra,
                ledger=self.ledger,
            )
            for i, each in enumerate(urls)
        ]
        self._judges: list[Judge] = []  # since the probe
        self._cache = None if cache is None else Cache(cache)
        if self._cache is not None:
            self.ledger.paid_before(*self._cache.tokens)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)
        self._thread.start()

    def probe(self) -> Probe:
        """The first of `probes`."""
        return self.probes()[0]

    def probes(self) -> list[Probe]:
        """Find out what each server can do, once: about eight requests, or one if the cache holds the result. The first
        is of the server whose replies the others share.

        If no model was named, the first one listed is used. Raises UserError if no server can be reached, or if one is
        not an OpenAI-compatible API, does not have the model, refuses, or has a model that gives no reply in time.
        """
        if not self._judges:
            self._run(self._probe()).result()
        known = [judge.endpoints[0] for judge in self._judges]
        known += [endpoint for endpoint in self.endpoints if endpoint not in known]
        return [endpoint.probed for endpoint in known if endpoint.probed is not None]

    @property
    def model(self) -> str:
        """Its name, or those of a panel's models; once it is known."""
        return ", ".join(dict.fromkeys(endpoint.model for endpoint in self.endpoints if endpoint.model))

    @property
    def max_tokens(self) -> int:
        """The longest reply that is read."""
        return max(endpoint.max_tokens for endpoint in self.endpoints)

    @property
    def most_words(self) -> int:
        """Upper bound on the words in the replies to one story: a word is at least one token."""
        return self.max_tokens * self.attempts * max(len(self._judges), 1)

    def stats(self) -> dict[str, Any]:
        """Requests, tokens and latencies since the last call, and the cost of the whole run (see `Ledger.stats`)."""
        return self.ledger.stats()

    def news(self) -> list[str]:
        """What the user should be told and was not yet: servers that went away or came back."""
        news = self._terms.news
        return [news.pop(0) for _ in range(len(news))]

    def forecast(self, stories: int, opening: str) -> dict[str, float]:
        """Estimate, from the probe, of grading so many stories: {"stories", "tokens_in", "tokens_out", "words" (the
        opening and all replies, for the student's budget), "cost", "hours"}. It assumes one readable reply per story.
        """
        self.probe()
        longer = len(opening.split()) + STORY_WORDS - len(" ".join(FIRST_STORY).split())
        total = dict.fromkeys(("tokens_in", "tokens_out", "words", "hours"), 0.0)
        for judge in self._judges:
            found = [endpoint.probed for endpoint in judge.endpoints if endpoint.probed]
            measured = len(str(render(*FIRST_STORY, fence="=", **self._rubric()))) / 4, len(found[0].reply) / 2  # chars
            asked, said = found[0].tokens or measured
            total["tokens_in"] += stories * (asked + longer * TOKENS_PER_WORD)
            total["tokens_out"] += stories * said
            total["words"] += stories * len(found[0].reply.split())
            per_s = sum(judge.endpoints[0].slots.most / each.seconds for each in found)
            total["hours"] = max(total["hours"], stories / per_s / 3600)
        total["words"] += len(opening.split())
        cost = self.ledger.price(total["tokens_in"], total["tokens_out"])
        counts = {name: round(total[name]) for name in ("tokens_in", "tokens_out", "words")}
        return {"stories": stories, **counts, "cost": cost, "hours": total["hours"]}

    def affords(self, stories: int) -> bool:
        """True if grading so many more stories stays within `budget_cost` even if each takes every attempt."""
        requests = stories * self.attempts * max(len(self._judges), 1)
        cap = max(endpoint.token_cap for endpoint in self.endpoints)
        return self.ledger.affords(requests * self.ledger.largest_in, requests * cap)

    def submit(
        self, opening: str, story: str, index: int, again: int = 0, afresh: bool = False
    ) -> "concurrent.futures.Future[Grade]":
        """Send one story, after `probe`. index: the story's number in the run, from which its fence is derived. again:
        how often the same story was sent before, if it is to be judged anew: with other seeds, and not from the cache.
        afresh: what an earlier process kept is not used.

        A story without text gets 0 for each criterion, by the rubric, and is not sent.
        """
        self.probe()
        return self._run(self._grade(opening, story, index, again, afresh))

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
        for endpoint in self.endpoints:
            await endpoint.server.close()

    async def _probe(self) -> None:
        """Examine every server and make the judges: one per model in a panel, else one of all."""
        outcomes = await asyncio.gather(*map(self._examine, self.endpoints), return_exceptions=True)
        away = {}
        for endpoint, outcome in zip(self.endpoints, outcomes, strict=True):
            if isinstance(outcome, Failure) and outcome.unreachable:
                away[endpoint] = outcome
            elif isinstance(outcome, Failure):
                raise UserError(f"the teacher at {endpoint.url} {outcome}") from None
            elif outcome is not None:
                raise outcome
        by_model: dict[str | None, list[Endpoint]] = {}
        for endpoint in self.endpoints:
            by_model.setdefault(endpoint.model if self.panel else None, []).append(endpoint)
        judges = []
        for endpoints in by_model.values():
            there = [endpoint for endpoint in endpoints if endpoint not in away]
            if not there:
                raise UserError(f"the teacher at {endpoints[0].url} {away[endpoints[0]]}")
            # The server that was examined first in the run, now or earlier, stands for its judge in the cache's keys.
            first = self._examined_first(there)
            judges.append(
                Judge([first, *(each for each in endpoints if each is not first)], self._terms, self._examine)
            )
            for endpoint in endpoints:
                if endpoint in away:
                    judges[-1].leave_out(endpoint, away[endpoint])
        if self.panel and len(judges) < 2:
            raise UserError("--teacher-panel needs at least two different models: name them with --teacher-model")
        if not self.panel and len({endpoint.model for endpoint in self.endpoints if endpoint not in away}) > 1:
            names = ", ".join(str(endpoint.model) for endpoint in self.endpoints)
            self._terms.news.append(f"{names} are taken for one model; if they are not, add --teacher-panel mean")
        self._judges = judges

    async def _examine(self, endpoint: Endpoint) -> None:
        """Find out what the server can do, or take it from the cache."""
        alone, asked = Judge([endpoint], self._terms, probing=True), Question([], "")
        listed, notes = None, []
        try:
            listed = await alone.ask(lambda it: it.server.models(), asked, reached=False)
        except Failure as failure:
            if failure.status is None:
                raise
            if endpoint.model is None:
                raise Failure(
                    f"{failure} (where models are not listed, name one with --teacher-model)", status=failure.status
                ) from None
            notes.append(f"{endpoint.url} {failure}; {endpoint.model} is tried without a list of models")
        said = endpoint.server.words(", ".join(listed or [])) or "none"
        if endpoint.model is None:
            if not listed:
                raise Failure("lists no model: load one, or name it with --teacher-model")
            endpoint.model = next((name for name in listed if not probing.NO_CHAT.search(name)), listed[0])
        elif listed is not None and endpoint.model not in listed:
            notes.append(f"{endpoint.url} does not list {endpoint.model}, which is tried; it lists: {said}")
        key = self._probe_key(endpoint)
        kept = self._cache.get(key) if self._cache is not None else None
        found = kept and Probe.load(kept.reply)
        # A probe without scores is not what a run starts from again, unless the run got scores in spite of it.
        if not found or not (found.scored or self._got_scores()):
            try:
                found = await self._find_out(endpoint, alone, notes)
            except Failure as failure:
                if failure.status == 404 and listed is not None and endpoint.model not in listed:
                    raise Failure(
                        f"has no model {endpoint.model!r} ({failure}); it lists: {said}", status=404
                    ) from None
                raise
            if self._cache is not None:
                self._cache.put(key, Kept(found.dump()), again=True)
        endpoint.probed = found
        if endpoint.model == PERSON:  # who may stop for lunch
            self._terms.deadline_s = endpoint.slots.shortest = PATIENCE_S

    async def _find_out(self, endpoint: Endpoint, alone: Judge, notes: list[str]) -> Probe:
        async def ask(form: Form, messages: list[dict], **fields: Any) -> Reply:
            try:
                most = self._terms.deadline_s / self.attempts
                return await asyncio.wait_for(endpoint.chat(form, messages, **fields), most)
            except asyncio.TimeoutError:
                raise Failure("takes too long to answer", again=True) from None

        mark = fence(self.seed, -1, "\n".join(FIRST_STORY))
        question = Question(render(*FIRST_STORY, fence=mark, **self._rubric()), mark)

        async def patiently(*args: Any, **fields: Any) -> Reply:
            return await alone.ask(lambda _: ask(*args, **fields), question)

        assert endpoint.model is not None
        return await probing.find_out(
            ask, patiently, question.messages, url=endpoint.url, model=endpoint.model, names=self.template.names,
            logprobs=self.logprobs, notes=notes, **endpoint.sampling(self.seed, self.temperature),
        )  # fmt: skip

    def _probe_key(self, endpoint: Endpoint) -> str:
        asked = f"{endpoint.max_reply} {self.temperature} {self.logprobs} {self.template}"
        about = f"{endpoint.url} {endpoint.model} {asked}" + (f" {self._extra_text()}" if self.extra else "")
        return "probe " + hashlib.sha256(about.encode()).hexdigest()[:24]

    def _extra_text(self) -> str:
        return json.dumps(self.extra, sort_keys=True)

    def _examined_first(self, endpoints: Sequence[Endpoint]) -> Endpoint:
        if self._cache is None:
            return endpoints[0]
        keys = {self._probe_key(endpoint): endpoint for endpoint in reversed(endpoints)}
        return next(keys[key] for key, _ in self._cache.items() if key in keys)

    def _got_scores(self) -> bool:
        assert self._cache is not None
        replies = (kept.reply for key, kept in self._cache.items() if not key.startswith("probe "))
        return any(parse_scores(reply, self.template.names) for reply in replies)

    def _rubric(self) -> dict:
        return {"criteria": self.template.criteria, "preface": self.template.preface}

    async def _grade(self, opening: str, story: str, index: int, again: int, afresh: bool) -> Grade:
        # After a fatal failure most of the other tasks are never awaited: asyncio need not report their exceptions.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        if empty := grade_if_empty(self.template, story):
            return empty
        mark = fence(self.seed, index, f"{opening}\n{story}")
        messages = render(opening, story, fence=mark, **self._rubric())
        before = again * self.attempts
        if not self.panel:
            return await self._judged(self._judges[0], Question(messages, mark, afresh), before)
        questions = [Question(messages, mark, afresh) for _ in self._judges]
        grades = await asyncio.gather(*map(self._judged, self._judges, questions, [before] * len(questions)))
        return panel_grade(self.template, [str(judge.endpoints[0].model) for judge in self._judges], grades, self.panel)

    async def _judged(self, judge: Judge, question: Question, before: int) -> Grade:
        scores: Mapping[str, float] | None = None
        replies: list[str] = []
        error: str | None = None
        while scores is None and error is None:
            try:
                reply, expected = await self._reply(judge, question, attempt=before + len(replies))
            except Failure as failure:
                error = f"the teacher {failure}"
            else:
                replies.append(reply)
                scores = expected if self.logprobs else parse_scores(reply, self.template.names)
                if scores is None and len(replies) == self.attempts:
                    error = f"no scores in {len(replies)} replies"
        seconds = 0.0 if question.since is None else time.monotonic() - question.since
        return grade_of(self.template, scores, replies, max_tokens=self.max_tokens, seconds=seconds, error=error)

    async def _reply(self, judge: Judge, question: Question, attempt: int) -> Kept:
        """One reply: from the cache, or a new one, which is then kept there."""
        weighed = probing.LOGPROBS if self.logprobs else {}
        first, seed = judge.endpoints[0], self.seed + attempt
        assert first.model is not None and first.probed is not None  # since the probe
        if self._cache is not None:
            about = first.sampling(seed, self.temperature) | weighed | {"held_to": first.probed.held_to}
            about |= {"extra": self._extra_text()} if self.extra else {}
            key = cache_key(first.model, question.messages, question.fence, about)
            kept = self._cache.get(key, earlier=not question.afresh)
            if kept is not None:
                self.ledger.count("cached")
                return kept

        async def ask(endpoint: Endpoint) -> tuple[Reply, str]:
            assert endpoint.probed is not None
            held = probing.options(endpoint.probed.held_to, self.template.names)
            fields = {**endpoint.sampling(seed, self.temperature), **weighed, **held}
            return await endpoint.chat(endpoint.probed, question.messages, **fields), endpoint.url

        reply, url = await judge.ask(ask, question)
        kept = Kept(reply.text)
        if self.logprobs:
            kept = Kept(reply.text, expected_scores(reply.text, self.template.names, reply.logprobs))
        if self._cache is None:
            return kept
        server = {"server": url} if len(self.endpoints) > 1 else {}
        about = {"model": first.model, "attempt": attempt, "tokens": reply.tokens, **server}
        return self._cache.put(key, kept, again=question.afresh, **about)
