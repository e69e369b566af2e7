"""A third protocol is one class: the client, the probe and the cache know none by name."""

import math
import re
from dataclasses import dataclass

import pytest
from conftest import ROOT
from fault_server import FaultServer, graded

from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Grade
from tinystory.teacher.prompt import Criterion, chat, user_message
from tinystory.teacher.protocol import Protocol, grammar_constraint

pytestmark = pytest.mark.usefixtures("short_pauses")


@dataclass(frozen=True)
class Corrections(Protocol):
    """The teacher writes the story without mistakes. The score is the fraction of the student's
    words that it keeps."""

    criteria: tuple[Criterion, ...] = (Criterion("kept", "What would you write instead?"),)
    preface: str = "You correct a beginner's stories. Reply with the corrected story."

    def messages(self, opening, story, mark):
        end = "\n\nThe corrected story:"
        return {
            "": chat(("system", self.preface), ("user", user_message(opening, story, mark, end)))
        }

    def constraint(self, held_to):
        return grammar_constraint("[A-Z].*", "[A-Z] [^\\n]*")

    def max_tokens(self, limit, held_to):
        return 200

    def reads(self, reply):
        return reply.text.endswith(".")

    def grade(self, submission, replies):
        ((reply,),) = replies.values()
        words = submission.story.split()
        kept = sum(word in reply.text.split() for word in words) / len(words)
        scores = {"kept": 3 * kept}
        return Grade(scores, self.score(scores))


def test_a_protocol_of_ones_own_is_one_class(tmp_path):
    def other(body):
        prompt = body["messages"][-1]["content"]
        if "The corrected story:" not in prompt:
            return "owl"
        return "A cat sat." if "cat" in prompt and body["seed"] == 1 else "I see"

    cache = tmp_path / "replies.jsonl"
    with FaultServer(other=other) as server:
        for _ in range(2):
            with Teacher([server.url], protocol=Corrections(), cache=cache) as teacher:
                cat, dog = graded(teacher, "Once", ["A cat sit on mat.", "A dog ran."])
                asked = len(server.others)
        assert len(server.others) == asked and server.others[-1]["max_tokens"] == 200
    assert cat.scores == {"kept": pytest.approx(3 * 2 / 5)} and math.isclose(cat.score, 2 / 5)
    assert cat.log_odds is None and dog.score is None and "3 replies" in dog.error


def test_the_teachers_package_needs_no_other_package_than_run():
    """No options, corpora, students or rubric: evaluate/open_grader.py knows what the options mean."""
    sources = (ROOT / "tinystory" / "teacher").glob("*.py")
    text = "".join(path.read_text() for path in sources)
    imported = set(re.findall(r"^from tinystory\.(\w+)", text, re.MULTILINE))
    assert imported == {"run", "teacher"}
