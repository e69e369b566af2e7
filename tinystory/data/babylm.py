"""BabyLM's 2026 rules: names of checkpoints and limits of the text tracks (babylm.github.io at
12e16f8, 20 July 2026; table in docs/evaluation.md).

The student may see 100 M words (Strict) or 10 M words (Strict-Small), including the teacher's
words, each up to ten times. Words are separated by white space. That the teacher may pass only text
to the student stands in the guidelines of 2025."""

from typing import Any

from tinystory.run.errors import UserError

# Cumulative words, counting repeats, at which the evaluation expects a checkpoint: `chck_1M` ...
# `chck_1000M`.
MILESTONES = [m * 10**6 for m in (*range(1, 10), *range(10, 100, 10), *range(100, 1001, 100))]

# words of corpus and teacher together, by preset
TRACKS = {"babylm-2026-strict": 100_000_000, "babylm-2026-strict-small": 10_000_000}
EPOCHS = 10


def milestone_name(words: int) -> str:
    return f"chck_{words // 10**6}M"


def check_pretraining(track: str, corpus_words: int, words: int, last_step: int = 0) -> None:
    """Raises UserError unless the track allows training on `words` words, counting repeats, of a
    corpus of `corpus_words`. last_step: most words by which the last step may exceed `words`."""
    limit = max(EPOCHS * corpus_words - last_step, 0)
    if corpus_words > TRACKS[track]:
        advice = "a smaller --corpus or a larger --val-fraction"
    elif words > limit:
        advice = f"--words {limit} or fewer"
    else:
        return
    raise UserError(
        f"--preset {track} allows {EPOCHS} epochs of a corpus of {TRACKS[track]:,} words, and "
        f"this one has {corpus_words:,} to train on: give {advice}"
    )


def check_interaction(track: str, history: dict[str, Any], words_in: int) -> None:
    """Raises UserError unless the track allows a student with this `history` (see
    `checkpoint.save`) to take in `words_in` more words. The rules of 2026 do not limit the words
    that a student writes."""
    if "corpus_words" not in history:
        raise UserError(
            f"--preset {track} needs the number of words that the student was trained on, which "
            f"this checkpoint does not say: start from one that train_pretrain.py --preset {track} "
            "wrote"
        )
    check_pretraining(track, history["corpus_words"], history.get("words", 0))
    words_seen = history["corpus_words"] + history.get("interaction_words_in", 0)
    left = max(TRACKS[track] - words_seen, 0)
    if words_in > left:
        raise UserError(
            f"--preset {track} leaves this student {left:,} words after its training so far: give "
            f"--budget-words {left} or fewer"
        )


def milestones_between(before: int, words: int) -> list[str]:
    """Names of the milestones that reading from `before` to `words` words has passed."""
    return [milestone_name(count) for count in MILESTONES if before < count <= words]


def milestones_beyond(history: dict[str, Any]) -> dict[str, int]:
    """Names of the official milestones ahead of a student, each with the number of words to take in
    until then."""
    past = history.get("words", 0) + history.get("interaction_words_in", 0)
    return {milestone_name(words): words - past for words in MILESTONES if words > past}
