"""The graders of a run: the teacher, calibrated, and the second judge."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinystory.config import InteractConfig
from tinystory.data.corpus import BUILTIN, recorded_corpus
from tinystory.data.openings import Openings
from tinystory.evaluate.calibration import calibrated, scaled
from tinystory.evaluate.corruptions import corpus_documents, worked_examples
from tinystory.evaluate.likelihood import Likelihood
from tinystory.evaluate.open_grader import open_grader, open_judge
from tinystory.evaluate.recorded_scores import RecordedScores, read_scores
from tinystory.rl.policy import Policy
from tinystory.run import distributed
from tinystory.run.errors import UserError
from tinystory.run.folder import read_config
from tinystory.run.text import printable
from tinystory.student.model import Student
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Grader
from tinystory.teacher.protocol import Example


class Graders(NamedTuple):
    """The graders of a run. teacher: of the stories of each step. evaluator: of held-out stories;
    the teacher, except with --control. judge: the second judge; None without --judge. On ranks
    other than 0, all are idle."""

    teacher: Grader
    evaluator: Grader
    judge: Grader | None


@contextlib.contextmanager
def open_graders(
    config: InteractConfig,
    start: Path,
    policy: Policy,
    reference: Student,
    openings: Openings,
    step: int,
) -> Iterator[tuple[Graders, dict[str, Any]]]:
    """Yields the graders, and facts about the teacher for config.json. step: the last step of a
    resumed run. Raises UserError if a grader cannot grade."""
    folder = Path(config.out)
    corpus = known_corpus(config, policy.history)
    recorded: dict[str, Any] = {}
    if config.control or config.resume:  # the scale of a yes-or-no teacher belongs to the run
        recorded = read_config(Path(config.control[0]) if config.control else folder)["options"]

    def examples() -> Sequence[Example]:
        return worked_examples(corpus_documents(corpus))

    def likelihood() -> Grader:
        return Likelihood(reference, policy.tokenizer, openings.train, config)

    rubric_corpus: Sequence[str] = ()
    if config.judge == "rubric" or not (config.teacher_url or config.reward):
        rubric_corpus = config.corpus or recorded_corpus(policy.history.get("corpus"), start)

    opening_teacher = open_grader(
        config,
        corpus=rubric_corpus,
        replies=folder / "replies.jsonl",
        likelihood=likelihood,
        examples=examples,
    )
    opening_judge = open_judge(
        config,
        corpus=rubric_corpus,
        replies=folder / "judge_replies.jsonl",
        examples=examples,
    )
    with contextlib.ExitStack() as stack:

        def enter() -> Graders:
            idle = Grader({"scored_by": ""})
            if not distributed.is_rank0():
                return Graders(idle, idle, idle if config.judge else None)
            needs_teacher = config.eval_graded or not config.control
            evaluator = stack.enter_context(opening_teacher) if needs_teacher else idle
            teacher = open_control(config, openings, likelihood) if config.control else evaluator
            judge = stack.enter_context(opening_judge) if config.judge else None
            return Graders(teacher, evaluator, judge)

        graders = distributed.rank0_first(enter)
        teacher, evaluator, judge = graders

        def prepare() -> dict[str, Any]:
            models = taught_by(config, evaluator, recorded.get("taught_by"), step)
            facts: dict[str, Any] = {"taught_by": models} if models else {}
            if models and models != recorded.get("taught_by"):
                recorded.pop("answer_scale", None)  # it belongs to another model
            for grader, name in ((evaluator, "answer_scale"), (judge, "judge_scale")):
                scale = scaled(grader, corpus, recorded.get(name)) if grader else {}
                if scale:
                    facts[name] = scale
            return facts | calibrated(config, evaluator, corpus)

        facts = distributed.rank0_value(prepare)
        print(printable(f"student {start}, scored by {teacher.facts['scored_by']}"))
        yield graders, teacher.facts | facts


def open_control(
    config: InteractConfig, openings: Openings, likelihood: Callable[[], Grader]
) -> Grader:
    """The grader of the steps of a control. likelihood: constructs the grader of --reward
    likelihood. Raises UserError if the run that --control names cannot be repeated."""
    run, name = config.control
    count = config.steps * config.stories_per_step
    by_step = read_scores(Path(run), config, [openings[index] for index in range(count)])
    if name != "likelihood":
        return RecordedScores(name, by_step, config)
    grader = likelihood()
    grader.steps = len(by_step)
    return grader


def taught_by(
    config: InteractConfig, teacher: Grader, recorded: Any, step: int
) -> list[dict[str, Any]]:
    """Which model taught after which step, for config.json. recorded: this list in the config.json of
    a resumed run. Raises UserError if the model has changed, unless --any-model is given."""
    if not isinstance(teacher, Teacher):
        return []
    model = teacher.model
    match recorded:
        case [*_, {"model": str(last), "after_step": int(_)}]:
            if last == model:
                return recorded
            if config.any_model:
                return [*recorded, {"model": model, "after_step": step}]
            raise UserError(
                f"the teacher of this run was {last}, and the server now has {model}, whose scores cannot be "
                f"compared: serve {last} again, or give --any-model"
            )
    return [{"model": model, "after_step": step}]


def known_corpus(config: InteractConfig, history: dict[str, Any]) -> list[str]:
    """Names of the corpora for the calibration of a teacher: --corpus; else the built-in corpora on
    which the student was trained; else the built-in stories."""
    read = history.get("corpus") or []
    return config.corpus or [name for name in BUILTIN if name in read] or ["builtin"]
