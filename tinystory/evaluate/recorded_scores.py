"""The grader of a control run: scores of a finished run, in random order.

`train_interact.py --control RUN` repeats a run with the scores that its stories.jsonl records, so
the distribution of the scores in each step is the same, and only their relation to the stories is
lost (arXiv 2606.05932)."""

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from tinystory.config import InteractConfig
from tinystory.run.errors import Stop, UserError
from tinystory.run.records import STORIES, read_records
from tinystory.teacher.grade import NOT_ASKED, Grade, Grader, Submission

Scores = list[float | None]  # of the graded stories of a step, in order; None: unscored


def reordered(scores: Scores, name: str, key: str) -> Scores:
    """The scores of the control `name`: shuffled, in an order that depends on the key only; or
    constant, the mean in place of each score. Unscored rows stay unscored.

    A score may by chance stay where it is: in a permutation without fixed points, a story's own
    score would be less probable than any other, which is information about the story."""
    known = [score for score in scores if score is not None]
    if known and name == "constant":
        known = [fmean(known)] * len(known)
    random.Random(key).shuffle(known)
    order = iter(known)
    return [None if score is None else next(order) for score in scores]


class RecordedScores(Grader):
    """A grader that returns the scores of `by_step`, the scores of each step of a run, `reordered`.
    Text and tokens of the stories do not matter, only the step."""

    def __init__(self, name: str, by_step: Sequence[Scores], config: InteractConfig):
        super().__init__({"scored_by": f"scores of another run ({name})"})
        self.name = name
        self.by_step = by_step
        self.config = config
        self.steps = len(by_step)
        self.number = control_number(Path(config.out))

    def grades(self, submissions: Sequence[Submission], stop: Stop | None = None) -> list[Grade]:
        if not submissions:
            return []
        step = submissions[0].number // self.config.stories_per_step
        key = f"control {self.config.seed} {self.number} {step}"
        scores = reordered(self.by_step[step], self.name, key)
        if len(scores) != len(submissions):
            raise UserError(
                f"step {step + 1} of the run that --control names has {len(scores)} graded stories, and the "
                f"control has {len(submissions)}: the run was resumed with other --grades, so it has no control"
            )
        unscored = Grade(None, None, error="unscored in the run that this one repeats")
        return [unscored if score is None else Grade(None, score) for score in scores]


def control_number(folder: Path) -> int:
    """2 for the folder shuffled-2, which is the second control of a run; 1 for shuffled."""
    last = folder.name.rpartition("-")[2]
    return int(last) if last.isdigit() else 1


def read_scores(run: Path, config: InteractConfig, openings: Sequence[str]) -> list[Scores]:
    """The scores of each step that a run's stories.jsonl records. openings: the openings of the
    control's first stories. Raises UserError unless the run is one that the control can repeat: the
    same openings, and config.stories_per_step stories in each step."""
    by_step: list[Scores] = []
    count = config.stories_per_step
    row = 0  # number of stories so far
    path = run / STORIES
    for record in read_records(path):
        if record["index"] != row or record["step"] != row // count + 1:
            raise UserError(
                f"{path} cannot be repeated: story {row} must be in step {row // count + 1}, with "
                f"{count} stories per step (--stories-per-step)"
            )
        if row < len(openings) and record["opening"] != openings[row]:
            raise UserError(
                f"{path} has another opening for story {row} than this run: give --openings as for {run}"
            )
        if row % count == 0:
            by_step.append([])
        if record["reply"] != NOT_ASKED.error:
            by_step[-1].append(record["score"])
        row += 1
    if row % count:
        raise UserError(f"{path} cannot be repeated: its last step is not complete")
    if all(score is None for scores in by_step for score in scores):
        raise UserError(f"{path} records no score, so there is nothing to put in another order")
    return by_step
