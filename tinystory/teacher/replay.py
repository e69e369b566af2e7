"""The teacher of a recorded run, replayed without a server.

A run that starts from the same checkpoint with the same options writes the same stories (bit for bit on a CPU), so it
asks the same questions, gets the same replies and ends with the same weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tinystory.run.errors import UserError
from tinystory.run.folder import EVALUATIONS, STORIES, read_records
from tinystory.teacher.cache import REPLY, CachedReply, question_key
from tinystory.teacher.endpoint import Probe, facts_of, json_tokens
from tinystory.teacher.grade import Grade, Grader, Stories, grade_if_empty, grade_of
from tinystory.teacher.parse import parse_scores
from tinystory.teacher.prompt import DEFAULT, Template, Text, fence, render

if TYPE_CHECKING:
    from tinystory.run.device import Stop

REPLIES = "replies.jsonl"


class Replay(Grader):
    """Stands in for the Teacher of the run in the folder `run`. `template`, `max_tokens`, `attempts` and `logprobs`
    must have the values that they had there. Raises UserError if the folder holds no replies."""

    def __init__(
        self,
        run: Path,
        *,
        template: Template = DEFAULT,
        max_tokens: int = 16,
        attempts: int = 3,
        logprobs: bool = False,
    ):
        self.run, self.template, self.max_tokens, self.attempts = Path(run), template, max_tokens, attempts
        self.logprobs = logprobs
        self._replies: dict[str, dict[int, CachedReply]] = {}  # by question and attempt
        probes: dict[str, Probe] = {}  # the last of each server, in the order of the first
        for record in read_records(self.run / REPLIES, REPLY):
            if record["key"].startswith("probe "):
                if probe := Probe.load(record["reply"]):
                    probes[probe.url] = probe
            elif isinstance(record.get("attempt"), int):
                question = record["key"][: len(question_key([], ""))]
                reply = CachedReply(record["reply"], record.get("expected"))
                self._replies.setdefault(question, {})[record["attempt"]] = reply  # the last counts
        if not probes:
            raise UserError(f"--replay {run}: no {REPLIES} there says who graded; give a run with a teacher")
        self._probes = [*probes.values()]
        super().__init__(facts_of(self._probes))
        if any(probe.held_to == "json" for probe in self._probes):
            self.max_tokens = max(self.max_tokens, json_tokens(template.names))
        # The stories that were given up: another story with the same words may have got a reply later.
        stories = (record for name in (STORIES, EVALUATIONS) for record in read_records(self.run / name))
        self._given_up = {(record["index"], record["story"]) for record in stories if record["reward"] is None}

    def probes(self) -> list[Probe]:
        """The recorded results of the run's probe."""
        return self._probes

    @property
    def most_words(self) -> int:
        return self.max_tokens * self.attempts

    def grades(self, stories: Stories, stop: "Stop | None" = None, again: int = 0) -> list[Grade]:
        """The recorded grades. Raises UserError for a story that was not graded in the run."""
        return [self._grade(text, text.template or self.template) for text in stories]

    def _grade(self, text: Text, template: Template) -> Grade:
        if empty := grade_if_empty(template, text.story):
            return empty
        opening, story, index, _ = text
        mark = fence(0, index, f"{opening}\n{story}")  # the question's key leaves the fence out
        messages = render(opening, story, fence=mark, template=template)
        recorded = self._replies.get(question_key(messages, mark), {})
        scores: Mapping[str, float] | None = None
        replies: list[str] = []
        while scores is None and len(replies) < self.attempts and len(replies) in recorded:
            reply, expected = recorded[len(replies)]
            replies.append(reply)
            scores = expected if self.logprobs else parse_scores(reply, template.names)
        error = None
        if (index, story) in self._given_up and scores is not None:
            scores, error = None, "the teacher gave no answer"
            del replies[-1]
        elif scores is None:
            given_up = index in {index for index, _ in self._given_up}  # whatever the text: a ranking's holds others
            if not given_up and len(replies) < self.attempts:
                raise UserError(
                    f"--replay {self.run}: story {index} was not graded there; start from the same checkpoint, with "
                    "the same options, on the same kind of machine, and with no more steps than the run had"
                )
            error = f"no scores in {len(replies)} replies"
        return grade_of(template, scores, replies, max_tokens=self.max_tokens, error=error)
