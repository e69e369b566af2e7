"""The limits of an interaction: words in and out, and what the teacher costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tinystory.config import InteractConfig
from tinystory.data.openings import Openings
from tinystory.rl.policy import RunState
from tinystory.rl.replay import Texts
from tinystory.run.errors import UserError


@dataclass
class Budget:
    """What a run may spend, and the milestones on the way (names, and words taken in). most_words: upper bound on the
    words in the replies to one story; affords: whether grading so many more stories is within the cost (which is
    limited once more, before each request)."""

    config: InteractConfig
    openings: Openings
    milestones: Mapping[str, int]
    most_words: int
    affords: Callable[[int], bool]

    def exhausted(self, state: RunState, texts: Texts, evaluations: int = 1) -> str:
        """Which limit does not hold another step, which replays these texts, and so many evaluations; "" if all do.
        Only rank 0 can tell."""
        config, evaluated = self.config, evaluations * self.config.eval_stories
        graded = config.graded_per_step + evaluated
        words_in = state.words_in + self.opening_words(state) + graded * self.most_words
        words_in += sum(words for _, words in texts)
        words_out = state.words_out + (config.stories_per_step + evaluated) * config.max_new_tokens
        if words_in > config.budget_words or words_out > config.budget_words_out:
            return f"the word budget ({config.budget_words:,} in, {config.budget_words_out:,} out)"
        return "" if self.affords(graded) else f"--budget-cost {config.budget_cost:g}"

    def require_first_step(self, state: RunState, texts: Texts) -> None:
        """Raises UserError if a new run cannot make a step."""
        if state.step == 0 and (limit := self.exhausted(state, texts, evaluations=2)):
            raise UserError(
                f"{limit} does not hold a single step and the evaluations around it: raise it, or lower "
                "--stories-per-step or --eval-stories"
            )

    def opening_words(self, state: RunState) -> int:
        """The words of the openings that the next step is the first to use."""
        repeated = self.config.charge_opening and state.step == 0
        return self.openings.new_words(state.written, self.config.stories_per_step, repeated)

    def passed(self, before: int, words_in: int) -> list[str]:
        """The names of the milestones between two counts of words taken in."""
        return [name for name, words in self.milestones.items() if before < words <= words_in]
