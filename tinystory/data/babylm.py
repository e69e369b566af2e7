"""BabyLM's rules: the names of checkpoints, and the limits of the 2025 INTERACTION track (babylm.github.io, 2025 call).

The student may see 100 M words, including the teacher's, each up to ten times, and write 100 M during training. The
rules do not define a word; here words are separated by whitespace. Only the teacher's text may reach the student.
"""

from typing import Any

from tinystory.run.errors import UserError

# Cumulative words, counting repeats, at which the evaluation expects a checkpoint: `chck_1M` ... `chck_1000M`.
MILESTONES = [m * 10**6 for m in (*range(1, 10), *range(10, 100, 10), *range(100, 1001, 100))]

TRACK = "babylm-2025"
WORDS_IN, WORDS_OUT, EPOCHS = 100_000_000, 100_000_000, 10


def milestone_name(words: int) -> str:
    return f"chck_{words // 10**6}M"


def check_pretraining(corpus_words: int, words: int, last_step: int = 0) -> None:
    """Raises UserError unless the track allows training on `words` words, counting repeats, of a corpus of
    `corpus_words`. last_step: upper bound on the words by which the last step may exceed `words`."""
    if corpus_words > WORDS_IN:
        raise UserError(
            f"--preset {TRACK} allows a corpus of {WORDS_IN:,} words and this one trains on {corpus_words:,}: give a "
            "smaller --corpus or a larger --val-fraction"
        )
    limit = max(EPOCHS * corpus_words - last_step, 0)
    if words > limit:
        raise UserError(
            f"--preset {TRACK} allows {EPOCHS} epochs and this corpus trains on {corpus_words:,} words: give --words "
            f"{limit} or fewer"
        )


def check_interaction(facts: dict[str, Any], words_in: int, words_out: int, reads: int = 0) -> None:
    """Raises UserError unless the track allows a student with these `facts` (see `checkpoint.save`) to take in and
    write so many words. reads: how many of them may be its corpus again."""
    if "corpus_words" not in facts:
        raise UserError(
            f"--preset {TRACK} needs the number of words that the student was trained on, which this checkpoint "
            f"does not say: start from one that train_pretrain.py --preset {TRACK} wrote"
        )
    check_pretraining(facts["corpus_words"], facts["words"], reads)
    left_in = WORDS_IN - facts["corpus_words"] - facts.get("interaction_words_in", 0)
    left_out = WORDS_OUT - facts.get("interaction_words_out", 0)
    for flag, budget, left in (("budget-words", words_in, left_in), ("budget-words-out", words_out, left_out)):
        if budget > left:
            raise UserError(
                f"--preset {TRACK} leaves this student {max(left, 0):,} words after its training so far: give --{flag} "
                f"{max(left, 0)} or fewer"
            )


def milestones_beyond(facts: dict[str, Any]) -> dict[str, int]:
    """The official milestones ahead of a student, and how many more words it takes in until each."""
    past = facts["words"] + facts.get("interaction_words_in", 0)
    return {milestone_name(words): words - past for words in MILESTONES if words > past}
