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
    """A run's limits, and its milestones (name -> words in). most_words bounds the words of the
    replies to one story. affords(n): whether grading n more stories is within the cost, which is
    checked again before each request."""

    config: InteractConfig
    openings: Openings
    milestones: Mapping[str, int]
    most_words: int
    affords: Callable[[int], bool]

    def exhausted(self, state: RunState, evaluations: int = 1, trial: int = 0) -> str:
        """The limit that a step, these evaluations and a trial of so many stories would exceed, or
        "". Rank 0 only."""
        config = self.config
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
            return f"the word budget ({config.budget_words:,} in, {config.budget_words_out:,} out)"
        if not self.affords(graded):
            return f"--budget-cost {config.budget_cost:g}"
        return ""

    def require_first_step(self, state: RunState, trial: int = 0) -> None:
        """Raises UserError if a new run cannot afford its trial of temperatures, of so many stories,
        and one step."""
        if state.step:
            return
        limit = self.exhausted(state, evaluations=2, trial=trial)
        if limit:
            before = f"the trial of --temperature 0 ({trial} stories), " if trial else ""
            advice = ", or give a --temperature above 0" if trial else ""
            raise UserError(
                f"{limit} does not hold {before}a single step and the evaluations around it: raise it, "
                f"or lower --stories-per-step or --eval-stories{advice}"
            )

    def opening_words(self, state: RunState) -> int:
        """Words of the openings that the next step uses for the first time."""
        return self.openings.new_words(state.written, self.config.stories_per_step)

    def passed(self, before: int, words_in: int) -> list[str]:
        """Names of the milestones between two counts of words in."""
        return [name for name, words in self.milestones.items() if before < words <= words_in]
