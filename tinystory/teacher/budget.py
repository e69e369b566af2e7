"""The limits of an interaction: words in and out, and what the teacher costs."""

from dataclasses import dataclass

from tinystory.config import InteractConfig
from tinystory.data.openings import Openings
from tinystory.rl.policy import RunState
from tinystory.rl.replay import CorpusReplay
from tinystory.run import distributed
from tinystory.run.errors import UserError
from tinystory.teacher.grade import Grader


@dataclass
class Budget:
    """What a run may spend. (The cost is limited once more, before each request.)"""

    config: InteractConfig
    grader: Grader
    openings: Openings
    replay: CorpusReplay

    def exhausted(self, state: RunState, evaluations: int = 1) -> str:
        """Which limit does not hold another step and so many evaluations, as rank 0 sees it; "" if all do."""
        return distributed.rank0_value(lambda: self._exhausted(state, evaluations))

    def require_first_step(self, state: RunState) -> None:
        """Raises UserError if a new run cannot make a step."""
        if state.step == 0 and (limit := self.exhausted(state, evaluations=2)):
            raise UserError(
                f"{limit} does not hold a single step and the evaluations around it: raise it, or lower "
                "--stories-per-step or --eval-stories"
            )

    def _exhausted(self, state: RunState, evaluations: int) -> str:
        config, n = self.config, self.config.stories_per_step
        stories = n + evaluations * config.stories_per_evaluation
        words_in = self.openings.new_words(state.written, n, config.charge_opening and state.step == 0)
        words_in += state.words_in + stories * self.grader.most_words
        words_in += sum(words for _, words in self.replay.batches(state.step))
        words_out = state.words_out + stories * config.max_new_tokens
        if words_in > config.budget_words or words_out > config.budget_words_out:
            return f"the word budget ({config.budget_words:,} in, {config.budget_words_out:,} out)"
        return "" if self.grader.affords(n + config.stories_per_evaluation) else f"--budget-cost {config.budget_cost:g}"
