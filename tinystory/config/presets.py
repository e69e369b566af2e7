"""Named sets of option values, and the defaults of learners and teachers."""

from typing import Any

# TinyStories on two CPU cores. The unlikely tokens of so small a student are noise, so a temperature
# is chosen first.
_ENGLISH_PRETRAIN = dict(
    n_layer=4,
    n_embd=256,
    vocab_size=4096,
    corpus=["tinystories-valid"],
    words=6_000_000,
    batch_size=16,
)
_ENGLISH_INTERACT = dict(
    temperature=0.0, stories_per_step=768, learning_rate=4e-4, logit_scale_lr=0.02
)
# Source of `paper`: arXiv 2509.15714 and its public code. If these set no value, the defaults of
# the libraries apply (gradient clipping in pretraining: transformers' Trainer; float32 in
# interaction: TRL). Values that are equal to our defaults are not repeated.
_PAPER_PRETRAIN = dict(
    n_layer=12,
    n_head=12,
    n_embd=768,
    context=512,
    vocab_size=16_000,
    weights_init="gpt2",
    optimizer="adamw",
    packing="stream",
    dropout=0.1,
    corpus=["babylm-100m"],
    words=990_000_000,
    val_fraction=0.1,
    batch_size=256,
    micro_batch_size=32,
    learning_rate=5e-4,
    warmup=0.01,
    beta2=0.999,
    eval_every=250,
    eval_sequences=64,
    save_every=250,
)
PAPER_OPENING = "Let me tell you a long, magical tale. Once upon a time, in a faraway land,"
_PAPER_INTERACT = dict(
    dtype="float32",
    openings=PAPER_OPENING,
    teacher_max_tokens=6,
    steps=920,
    stories_per_step=360,
    max_new_tokens=90,
    temperature=1.0,
    diversity=0.0,
    unfinished=1.0,
    eval_every=0,
    save_every=20,
    learning_rate=1e-6,
    lr_decay=False,
    logit_scale_lr=0.0,
    learner="gae",
    epochs=4,
    minibatch_size=0,
    kl_coef=0.2,
    kl_horizon=10_000.0,
)
# At most ten epochs (see babylm.py) of a part of the corpus, which leaves room for the teacher's
# words.
_STRICT_PRETRAIN = dict(_PAPER_PRETRAIN, words=900_000_000, val_fraction=0.05)
_STRICT_SMALL_PRETRAIN = dict(
    _PAPER_PRETRAIN, corpus=["babylm-10m"], words=85_000_000, val_fraction=0.12, batch_size=64
)
# Option values of a pretraining and of the interaction after it, by the name of the preset.
PRETRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "english": _ENGLISH_PRETRAIN,
    "paper": _PAPER_PRETRAIN,
    "babylm-2026-strict": _STRICT_PRETRAIN,
    "babylm-2026-strict-small": _STRICT_SMALL_PRETRAIN,
}
INTERACT_PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "english": _ENGLISH_INTERACT,
    "paper": _PAPER_INTERACT,
    "babylm-2026-strict": _PAPER_INTERACT,
    "babylm-2026-strict-small": _PAPER_INTERACT,
}
# Option values for each learner of the table in tinystory/rl/learners.py, as measured on the demo
# (lab/results/demo.md). They apply unless the user or the preset gives others.
LEARNER_DEFAULTS: dict[str, dict[str, Any]] = {
    "ridge": {},
    "gae": {},
    "rloo": dict(stories_per_opening=8),
    "grpo": dict(stories_per_opening=8),
    "dr_grpo": dict(stories_per_opening=8),
    "dpo": dict(stories_per_opening=2, learning_rate=4e-4, kl_coef=0.1),
    "sft-best": dict(epochs=4),
}
# Option values for a --teacher-url without --teacher-prompt, if the student has learned the demo's
# corpora: what made a language model of 1.5 B parameters teach (docs/teachers.md).
TEACHER_DEFAULTS: dict[str, Any] = dict(
    teacher_prompt="event", grades=64, steps=8, judge="rubric", eval_graded=False
)
