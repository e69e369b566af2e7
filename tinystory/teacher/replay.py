"""The teacher of a recorded run, replayed without a server.

A run that starts from the same checkpoint with the same options writes the same stories (bit for bit on a CPU), so it
asks the same questions, gets the same replies and ends with the same weights.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tinystory.run.errors import UserError
from tinystory.run.folder import EVALUATIONS, STORIES, read_records
from tinystory.teacher import probe as probing
from tinystory.teacher.cache import Kept, question_key, records
from tinystory.teacher.grade import Grade, grade_if_empty, grade_of, panel_grade, parse_scores
from tinystory.teacher.probe import Probe
from tinystory.teacher.prompt import Template, fence, render

REPLIES = "replies.jsonl"


class Replay:
    """Stands in for the Teacher of the run in the folder `run`. `template`, `max_tokens`, `attempts` and `logprobs`
    must have the values that they had there. Raises UserError if the folder holds no replies."""

    def __init__(
        self,
        run: Path,
        *,
        template: Template = Template(),  # noqa: B008 - frozen
        max_tokens: int = 16,
        attempts: int = 3,
        logprobs: bool = False,
        panel: str = "",
    ):
        self.run, self.template, self.max_tokens, self.attempts = Path(run), template, max_tokens, attempts
        self.logprobs, self.panel = logprobs, panel
        self._replies: dict[tuple[str, str], dict[int, Kept]] = {}  # per model (of a panel), question, and attempt
        probes: dict[str, Probe] = {}  # the last of each server, in the order of the first
        if not (self.run / REPLIES).is_file():
            raise UserError(f"--replay {run}: there is no {REPLIES} in it; give the folder of a run with a teacher")
        for record, _ in records(self.run / REPLIES):
            if record["key"].startswith("probe "):
                if found := Probe.load(record["reply"]):
                    probes[found.url] = found
            elif isinstance(record.get("attempt"), int):
                question = record["key"][: len(question_key([], ""))]
                asked = self._replies.setdefault((str(record.get("model")) if panel else "", question), {})
                asked[record["attempt"]] = Kept(record["reply"], record.get("expected"))  # the last: see Cache.put
        if not probes:
            raise UserError(f"--replay {run}: {REPLIES} does not say who gave the replies; run it again to replay it")
        self._probed = [*probes.values()]
        self._models = [*dict.fromkeys(found.model for found in self._probed)] if panel else [""]
        if any(found.held_to == "json" for found in self._probed):
            self.max_tokens = max(self.max_tokens, probing.json_tokens(template.names))
        # The stories that were given up: another story with the same words may have got a reply later.
        logs = [self.run / name for name in (STORIES, EVALUATIONS)]
        stories = (record for log in logs if log.exists() for record in read_records(log))
        self._given_up = {(record["index"], record["story"]) for record in stories if record["scores"] is None}

    def probe(self) -> Probe:
        return self._probed[0]

    def probes(self) -> list[Probe]:
        """The recorded results of the run's probe."""
        return self._probed

    @property
    def most_words(self) -> int:
        return self.max_tokens * self.attempts * len(self._models)

    def submit(self, opening: str, story: str, index: int, again: int = 0, afresh: bool = False) -> "Future[Grade]":
        """A finished future. Raises UserError at once for a story that was not graded in the run."""
        future: Future[Grade] = Future()
        future.set_result(grade_if_empty(self.template, story) or self._panel(opening, story, index))
        return future

    def _panel(self, opening: str, story: str, index: int) -> Grade:
        grades = [self._grade(model, opening, story, index) for model in self._models]
        return panel_grade(self.template, self._models, grades, self.panel) if self.panel else grades[0]

    def _grade(self, model: str, opening: str, story: str, index: int) -> Grade:
        mark = fence(0, index, f"{opening}\n{story}")  # the question's key leaves the fence out
        messages = render(opening, story, fence=mark, criteria=self.template.criteria, preface=self.template.preface)
        kept = self._replies.get((model, question_key(messages, mark)), {})
        scores: Mapping[str, float] | None = None
        replies: list[str] = []
        given_up = (index, story) in self._given_up
        while len(replies) < self.attempts and len(replies) in kept:
            reply, expected = kept[len(replies)]
            replies.append(reply)
            scores = expected if self.logprobs else parse_scores(reply, self.template.names)
            if scores is not None:
                break
        else:
            if not given_up and len(replies) < self.attempts:
                raise UserError(
                    f"--replay {self.run}: story {index} was not graded there; start from the same checkpoint, with "
                    "the same options, on the same kind of machine, and with no more steps than the run had"
                )
            error = f"no scores in {len(replies)} replies"
            return grade_of(self.template, None, replies, max_tokens=self.max_tokens, error=error)
        if given_up:
            error = "the teacher gave no answer"
            return grade_of(self.template, None, replies[:-1], max_tokens=self.max_tokens, error=error)
        return grade_of(self.template, scores, replies, max_tokens=self.max_tokens)

    def forecast(self, stories: int, opening: str) -> None:
        """A replay takes no time and costs nothing."""

    def affords(self, stories: int) -> bool:
        return True

    def stats(self) -> dict[str, Any]:
        return {}

    def news(self) -> list[str]:
        return []
