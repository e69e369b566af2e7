"""Options of train_interact.py."""

from dataclasses import dataclass

from tinystory.config.base import OUT_HELP, SAVE_HELP, RunConfig
from tinystory.config.presets import INTERACT_PRESETS, LEARNER_DEFAULTS, TEACHER_DEFAULTS
from tinystory.run.errors import UserError
from tinystory.run.options import is_url, option

FEWEST_GRADES = 8  # minimum of --grades
LEAST_TEMPERATURE = 0.01
# the named prompts: PROTOCOLS in tinystory/teacher/named_protocols.py
PROMPTS = ("event", "examples", "sense", "thread", "grades")
REWARDS = ("random", "constant", "likelihood")  # controls of --reward; else a function in a file
ENDPOINT_OPTIONS = (  # without effect on the built-in teacher
    *("teacher_model", "teacher_temperature", "teacher_max_tokens", "teacher_extra"),
    *("teacher_prompt", "price_in", "price_out", "budget_cost"),
)
TEACHER_OPTIONS = (  # without use in a control, unless they are given
    *("teacher_url", "any_model", "teacher_concurrency", "teacher_per_minute", "teacher_timeout"),
    *("reward", "calibrate", "min_auc"),
    *ENDPOINT_OPTIONS,
)


@dataclass
class InteractConfig(RunConfig):
    """Train a student by interaction: it writes stories, a teacher scores them, PPO learns from the
    scores."""

    presets = INTERACT_PRESETS

    out: str = option("runs/interact", OUT_HELP)
    init: str = option(
        "",
        "checkpoint to start from, or hub:NAME@REVISION (default: that of the newest pretraining "
        "run)",
    )
    steps: int = option(4, "maximum number of PPO steps", "[1, 1e9]")
    save_every: int = option(1, SAVE_HELP, "[1, 1e9]")
    control: list[str] = option(
        [],
        "finished run to repeat as its own control, without its teacher: each story gets the score "
        "that another story of the same step had (shuffled, the default). A second word chooses "
        "another control: constant, the step's mean score; or likelihood (docs/evaluation.md)",
    )
    stop_on_collapse: bool = option(
        False,
        "whether to save and end the run when the stories collapse or the KL far exceeds its target",
    )

    teacher_url: list[str] = option(
        [],
        "URLs of OpenAI-compatible servers with the same model, such as http://127.0.0.1:11434/v1 "
        "(default: the built-in teacher)",
        group="teacher",
    )
    teacher_model: list[str] = option(
        [],
        "model name of the teacher, or one name per --teacher-url (default: the server's first model)",
    )
    any_model: bool = option(
        False,
        "whether replies may come from another model than at the beginning of the run, although "
        "its scores may not be comparable",
    )
    corpus: list[str] = option(
        [],
        "corpora or files to which the built-in teacher is fitted, and from which --teacher-url's "
        "calibration texts are taken (default: the student's corpus without dull, unless that was a file)",
    )
    teacher_concurrency: int = option(
        16, "maximum number of requests in flight per server", "[1, 10000]"
    )
    teacher_per_minute: int = option(
        0,
        "maximum number of requests per minute to each server (default: as many as it allows)",
        "[0, 1000000]",
    )
    teacher_temperature: float = option(0.2, "sampling temperature of the teacher", "[0, 2]")
    teacher_extra: str = option(
        "", "JSON object with fields to add to each request, such as service_tier"
    )
    teacher_max_tokens: int = option(
        16, "maximum tokens of a teacher's reply; three numbers need 6", "[1, 100000]"
    )
    teacher_timeout: float = option(
        300.0,
        "time limit in seconds for a teacher's reply, or for a call of --reward",
        "(0, 86400]",
    )
    teacher_prompt: str = option(
        "",
        "prompt of the teacher: event, examples, sense or thread, which are yes-or-no questions; "
        "grades; or a JSON file with other criteria or questions (docs/teachers.md). Default: "
        "grades; for a student of the demo's corpora "
        f"{TEACHER_DEFAULTS['teacher_prompt']}, with further options that the run prints. "
        "scripts/doctor.py measures which one judges best",
    )
    price_in: float = option(0.0, "price of a million prompt tokens, in any currency", "[0, 1e9]")
    price_out: float = option(
        0.0, "price of a million reply tokens, in the same currency", "[0, 1e9]"
    )
    budget_cost: float = option(
        0.0, "maximum cost of the teacher, at --price-in and --price-out; 0: no limit", "[0, 1e12]"
    )
    reward: str = option(
        "",
        "function that replaces the teacher, FILE.py[:FUNCTION]: score(opening, stories) returns a "
        "number from 0 to 1 or None per story; or a control: random, constant, or likelihood (the "
        "story's log-likelihood under the starting checkpoint)",
    )
    calibrate: bool = option(
        True,
        "whether to measure before the run how well --teacher-url distinguishes real stories from "
        "bad texts",
    )
    min_auc: float = option(
        0.0,
        "minimum AUC of the teacher's calibration, for the kind of bad text that it recognises "
        "best; 0.5 is chance",
        "[0, 1)",
    )
    max_unscored: float = option(
        0.1,
        "maximum fraction of a step's graded stories without a score; above it the run ends",
        "[0, 1)",
    )
    grades: int = option(
        0,
        "total grades to request in the run; a regression model selects the most informative "
        "stories and predicts the other scores; 0: grade every story",
        "[0, 1e9]",
    )

    openings: str = option(
        "builtin",
        "openings (prompts): builtin, a file with one opening per line, or the text of an opening",
        group="story",
        flags=("--opening",),
    )
    stories_per_opening: int = option(1, "number of stories per opening within a step", "[1, 1e9]")
    stories_per_step: int = option(
        384, "number of stories that the student writes per step", "[1, 1e6]"
    )
    max_new_tokens: int = option(200, "maximum tokens of a story", "[1, 1e6]")
    temperature: float = option(
        0.85,
        "temperature folded into the starting student; 0: try 1, 0.8, 0.65, 0.5 and 0.4, and use "
        "the temperature with the highest mean reward",
        "[0, 100]",
    )
    budget_words: int = option(
        1_000_000,
        "maximum words that the student takes in: each opening once, and all replies",
        "[1, 1e15]",
    )
    budget_words_out: int = option(
        100_000_000, "maximum words that the student writes", "[1, 1e15]"
    )
    length_weight: float = option(
        0.4, "weight of the reward's length term, relative to the teacher's score", "[0, 100]"
    )
    length_words: int = option(
        90, "number of words at which the length term reaches its maximum", "[1, 1e9]"
    )
    diversity: float = option(
        0.5, "weight of the diversity factor in the score; 0: none, 1: full", "[0, 1]"
    )
    unfinished: float = option(
        0.5, "fraction of the reward that a story without an end token keeps", "[0, 1]"
    )

    learning_rate: float = option(
        1.2e-3, "initial learning rate of Adam", "(0, 100]", group="optimiser"
    )
    lr_decay: bool = option(
        True, "linear decay of the learning rates to 0, over all updates of the run"
    )
    logit_scale_lr: float = option(
        0.03,
        "initial learning rate of the scale of all logits; 0: no separate learning rate",
        "[0, 10]",
    )
    minibatch_size: int = option(
        96, "stories per gradient step; 0: all stories of the step", "[0, 1e9]"
    )
    micro_batch_size: int = option(
        32,
        "stories per forward pass; gradients are accumulated over a minibatch (default on a GPU "
        "with 16 GB: up to 128)",
        "[1, 1e9]",
    )
    grad_clip: float = option(0.0, "maximum gradient norm; 0: no clipping", "[0, 1e9]")

    epochs: int = option(1, "number of passes over a step's stories", "[1, 1000]", group="PPO")
    learner: str = option(
        "ridge",
        "learning algorithm: PPO with values by ridge regression (ridge) or by a value head (gae); "
        "rloo, grpo and dr_grpo (with --stories-per-opening 8); dpo, on the best and the worst story "
        "for an opening (with --stories-per-opening 2 --learning-rate 4e-4 --kl-coef 0.1); or "
        "sft-best, cross-entropy on the best quarter of a step's stories, in four passes. The values in "
        "parentheses are the learner's defaults",
        tuple(LEARNER_DEFAULTS),
    )
    gamma: float = option(1.0, "discount factor", "[0, 1]")
    lam: float = option(
        0.95,
        "lambda of GAE; use 1 with --learner gae, or with few stories per step",
        "[0, 1]",
    )
    clip_ratio: float = option(0.2, "clipping range of the policy ratio", "(0, 10]")
    value_coef: float = option(0.1, "weight of the value loss, for --learner gae", "(0, 1000]")
    kl_in: str = option(
        "reward", "place of the KL penalty; in the loss, the estimator is k3", ("reward", "loss")
    )
    kl_coef: float = option(
        0.01,
        "initial coefficient of the KL penalty against the starting checkpoint; beta of --learner dpo",
        "[0, 1000]",
    )
    kl_target: float = option(
        6.0,
        "target KL per story, in nats, of the adaptive controller, which changes the coefficient by at "
        "most 20 % in --kl-horizon stories",
        "(0, 1e6]",
    )
    kl_horizon: float = option(
        2_000.0, "horizon of the adaptive KL controller, in stories", "(0, 1e12]"
    )
    eval_every: int = option(
        1,
        "steps between evaluations; 0: only at the start and the end",
        "[0, 1e9]",
        group="evaluation",
    )
    eval_stories: int = option(
        40,
        "stories per evaluation",
        "[1, 1e6]",
    )
    eval_graded: bool = option(
        True, "whether the teacher grades evaluations; if not, `best` is the last student"
    )
    judge: str = option(
        "",
        "second judge that scores the stories of each evaluation: a URL, FILE.py[:FUNCTION] or "
        "rubric (the built-in teacher). These scores are reported and never part of the reward",
    )
    judge_model: str = option("", "model name of a --judge URL (default: the server's first model)")
    judge_prompt: str = option(
        "", "prompt of a --judge URL; the values are those of --teacher-prompt"
    )

    def check_together(self) -> None:
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"--temperature must be 0 or at least {LEAST_TEMPERATURE}, not {self.temperature:g}"
            )
        if self.temperature == 0 and self.reward == "likelihood":
            raise UserError(
                "--temperature 0 tries several temperatures, and --reward likelihood depends on the "
                "temperature: give a --temperature above 0"
            )
        if self.budget_cost and not self.price_in + self.price_out:
            raise UserError(
                "--budget-cost needs prices: give --price-in and --price-out, per million tokens"
            )
        if self.judge in REWARDS:
            raise UserError(
                f"--judge {self.judge} cannot judge: give a URL, FILE.py[:FUNCTION] or rubric"
            )
        if self.corpus and self.reward and self.judge != "rubric":
            raise UserError(
                "--corpus is for the built-in teacher or --teacher-url, and --reward replaces the teacher: "
                "leave --corpus out"
            )
        if self.kl_horizon <= self.stories_per_step / 5:
            raise UserError(
                f"--kl-horizon {self.kl_horizon:g} must be above a fifth of --stories-per-step "
                f"{self.stories_per_step}: otherwise one step could make the KL coefficient negative"
            )
        if not self.grades:
            return
        most = self.stories_per_step * self.steps // 2
        if not FEWEST_GRADES <= self.grades <= most or self.stories_per_step <= FEWEST_GRADES:
            raise UserError(
                f"--grades {self.grades} must be from {FEWEST_GRADES} to {most}, half of the stories of all "
                f"steps, and --stories-per-step above {FEWEST_GRADES}: --grades 0 grades all stories"
            )

    def without_effect(self) -> dict[str, str]:
        idle = {}
        no_teacher = ""
        if self.reward:
            no_teacher = "with --reward, which replaces the teacher: leave --reward out"
            idle["teacher_concurrency"] = idle["teacher_url"] = no_teacher
        elif not self.teacher_url:
            no_teacher = "on the built-in teacher: give a --teacher-url"
        if no_teacher:
            idle |= dict.fromkeys(ENDPOINT_OPTIONS, no_teacher)
        if not is_url(self.judge):
            idle["judge_model"] = idle["judge_prompt"] = "without a URL: give --judge URL"
        if not self.calibrate:
            idle["min_auc"] = "with --no-calibrate: leave --no-calibrate out"
        if not self.kl_coef:
            no_penalty = "with --kl-coef 0, because the controller multiplies it: give a --kl-coef"
            idle["kl_target"] = idle["kl_horizon"] = no_penalty
        return idle
