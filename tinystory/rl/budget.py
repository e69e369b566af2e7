"""The limits of an interaction: words in, words out, and the teacher's cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tinystory.config import InteractConfig
from tinystory.data.openings import Openings
from tinystory.rl.policy import RunState
from tinystory.rl.score_model import grades_of_step
from tinystory.run.errors import UserError


@dataclass
class Budget:
    """Limits of a run on words and cost. milestones: words in, by name. most_words: upper bound on
    the words of all replies about one story. affords(n): whether --budget-cost suffices for grading
    n more stories; the cost is checked again before each request. steps: number of steps for which
    the grader has scores."""

    config: InteractConfig
    openings: Openings
    milestones: Mapping[str, int]
    most_words: int
    affords: Callable[[int], bool]
    steps: float

    def exhausted(self, state: RunState, evaluations: int = 1, trial: int = 0) -> str:
        """The limit that one more step would exceed, together with `evaluations` evaluations and a
        trial of `trial` stories; "" if none. On rank 0 only."""
        config = self.config
        if state.step >= self.steps:
            return f"the record of {config.control[0]}"
        evaluated = evaluations * config.eval_stories
        graded = grades_of_step(config, state.step, state.asked)
        if config.eval_graded:
            graded += evaluated
        graded += trial
        written = config.stories_per_step + evaluated + trial
        reply_words = graded * self.most_words
        words_in = state.words_in + self.opening_words(state) + reply_words
        words_out = state.words_out + written * config.max_new_tokens
        if words_in > config.budget_words or words_out > config.budget_words_out:
            return (
                f"the word budget (--budget-words {config.budget_words:,} in, "
                f"--budget-words-out {config.budget_words_out:,} out)"
            )
        if not self.affords(graded):
            return f"--budget-cost {config.budget_cost:g}"
        return ""

    def require_first_step(self, state: RunState, trial: int = 0) -> None:
        """Raises UserError if the budget of a new run does not suffice for one step and the trial
        of temperatures, which has `trial` stories."""
        if state.step:
            return
        limit = self.exhausted(state, evaluations=2, trial=trial)
        if limit:
            before = f"the trial of --temperature 0 ({trial} stories), " if trial else ""
            advice = ", or give a --temperature above 0" if trial else ""
            raise UserError(
                f"{limit} does not suffice for {before}one step and the evaluations before and after "
                "that step: raise this budget, or lower --stories-per-step or "
                f"--eval-stories{advice}"
            )

    def opening_words(self, state: RunState) -> int:
        """Number of words of the openings that the next step uses for the first time."""
        return self.openings.new_words(state.written, self.config.stories_per_step)

    def passed(self, before: int, words_in: int) -> list[str]:
        """Names of the milestones that lie above `before` words in, and at most at `words_in`."""
        return [name for name, words in self.milestones.items() if before < words <= words_in]
