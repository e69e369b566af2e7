"""Does a student learn more from what a teacher writes than from what it scores? An experiment.

python lab/writing.py --seeds 71 72 73 --teacher-url URL --teacher-model NAME --reader GEMMA \\
    --pretrain "--preset english --corpus FILE --words 1500000 --val-fraction 0.1" \\
    --options "I --grades 256" "I --grades 256 --teacher-prompt examples --teacher-url URL"

For each seed, a student is pretrained with --pretrain. The student then writes a story for each of
--texts training openings. For the same openings, a language model at an OpenAI-compatible endpoint
(key: OPENAI_API_KEY) writes its own continuation, and a correction of the student's story. Every
reply is kept in OUT/replies.jsonl with its tokens, and no request is repeated. The model also says
which of two stories by the student is better, for --pairs openings (lab/preference.py;
OUT/pair_replies.jsonl).

The student learns from these texts by next-word prediction on them ("read"), by DPO with the
teacher's text against the student's own story ("prefer"), or by the one and then the other
("both"). All this happens before the temperature is folded in, because texts at temperature 1 would
undo the fold. Next-word prediction is mixed with a fifth of real stories. From pairs of its own
stories, the student learns by DPO alone. Controls: each story with the correction of another story
("shuffled"), pairs in random order, and as many words of real stories. Real stories
are held out, so the student has not read them, and are not those on which students are measured.
--options adds interactions by train_interact.py, as in lab/recipes.py: scores at the same price.
Finished students and measured rows are not repeated.

The command prints the tokens of each kind of text, and a table of measures at --temperature for
held-out openings: means over the seeds, and the gain in coherence with its 95 % interval."""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import torch

from lab import gain, recipes
from lab.intervals import interval
from lab.preference import FIRST, PREFERENCE, SECOND, StoryPair, compare, scores_of
from lab.reader import PACKAGED, SENTENCE_ENDS, Reader
from lab.recipes import Row
from lab.runs import (
    EXPERIMENT,
    folder_of,
    interact_config,
    judges_in,
    pretrain_config,
    require_same,
    words_of,
)
from tinystory.config import PretrainConfig
from tinystory.data.corpus import open_corpus
from tinystory.data.openings import Openings, load_openings
from tinystory.data.shards import held_out_documents
from tinystory.data.tokenizer import Tokenizer
from tinystory.evaluate.intervals import mean_of
from tinystory.evaluate.open_grader import open_grader
from tinystory.ops.compute import resolve
from tinystory.rl import ppo
from tinystory.rl.batch import collate
from tinystory.rl.learners import LEARNERS, equal_targets, likelihood_loss
from tinystory.rl.policy import Learner
from tinystory.rl.start import load_students
from tinystory.run.errors import UserError, command
from tinystory.run.folder import locked
from tinystory.run.options import add_number, script_parser
from tinystory.run.records import Record, read_records
from tinystory.student import checkpoint
from tinystory.student.generate import Story, encode_opening, generate
from tinystory.teacher.cache import Cache
from tinystory.teacher.client import Teacher
from tinystory.teacher.grade import Grader
from tinystory.teacher.named_protocols import load_protocol

LIMITS = "60 to 100 simple words. Write only the continuation."
PROMPTS = {
    "continuation": "This is the beginning of a story for small children. Continue the story and "
    f"bring it to an end. {LIMITS}\n\n{{opening}}",
    "correction": "A child continued the beginning of a story. Correct the child's continuation so "
    "that it makes sense and comes to an end, and keep what makes sense already. "
    f"{LIMITS}\n\nBeginning: {{opening}}\n\nThe child's continuation: {{story}}",
}
REPLY_TOKENS = 200
PAIR_REPLIES = "pair_replies.jsonl"
PAIRS = ("pair", "shuffled pair")  # kinds of lessons with two stories by the student
# Options of the two ways of learning: two passes, with an optimizer step per 16 texts. No step exceeds
# the KL target, because the teacher's texts are not the student's samples.
PASSES = "--steps 2 --minibatch-size 16 --kl-target 1e6"
READ = f"{PASSES} --temperature 1 --learner sft-best --epochs 1 --learning-rate 2e-4"
# To the student, its own stories are far likelier than the teacher's texts. At a rate of 1e-4 and
# beta 0.1, the loss is 0 after a step or two, and the student worse (LOG.md, a teacher that writes).
PREFER = (
    f"{PASSES} --temperature 1 --learner dpo --learning-rate 3e-5 --kl-coef 1 --logit-scale-lr 0"
)
READING = Learner(equal_targets, likelihood_loss)
CORPUS_SHARE = 0.2  # of the words that "read" learns from


class Reply(NamedTuple):
    """A teacher's text, with the tokens of its request and of the reply."""

    text: str
    tokens_in: int
    tokens_out: int


class Lesson(NamedTuple):
    """Texts to learn from. opening: the prompt; chosen: the text to learn; rejected: a story by the
    student for this opening."""

    opening: str
    chosen: str
    rejected: str


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--out", default="runs/writing", help="folder for the runs")
    add("--seeds", nargs="+", type=int, required=True, metavar="N", help="seeds of the students")
    add("--pretrain", default="", metavar="TEXT", help="options of train_pretrain.py")
    add("--options", nargs="*", default=[], metavar="TEXT", help="interactions to compare with")
    add("--teacher-url", required=True, metavar="URL", help="endpoint of the teacher that writes")
    add("--teacher-model", required=True, metavar="NAME")
    add("--reader", default=PACKAGED, metavar="NAME", help="language model that scores coherence")
    add_number(parser, "--concurrency", 4, "[1, 256]", "requests in flight")
    add_number(
        parser, "--texts", 256, "[2, 1e5]", "number of openings for which the teacher writes"
    )
    add_number(parser, "--pairs", 128, "[2, 1e5]", "number of pairs that the teacher compares")
    add_number(parser, "--temperature", 0.5, "(0, 4]", "temperature of the student")
    most = len(recipes.OPENINGS)
    add_number(parser, "--stories", 200, f"[2, {most}]", "number of stories per row")
    options = parser.parse_args(argv)
    if len(options.seeds) < 2:
        raise UserError("--seeds needs two seeds or more, for an interval")
    out = folder_of(options.out)
    pretraining = words_of("--pretrain", options.pretrain)
    corpus = pretrain_config(pretraining).corpus
    arms = {text: recipes.arm_of(text) for text in options.options}
    for arm in arms.values():
        interact_config(arm.words)
    write = teacher(options.teacher_url, options.teacher_model)
    reader = Reader(options.reader)
    openings = recipes.OPENINGS[: options.stories]
    students = []
    names = ("pretrain", "reader", "stories", "texts", "pairs", "temperature", "teacher_model")
    settings = {name: getattr(options, name) for name in names}
    with (
        locked(out),
        Teacher(
            [options.teacher_url],
            [options.teacher_model],
            concurrency=options.concurrency,
            cache=out / PAIR_REPLIES,
            protocol=load_protocol(PREFERENCE),
        ) as judge,
        open_grader(recipes.CONFIG, corpus=corpus) as rubric,
    ):
        require_same(out / EXPERIMENT, settings | judges_in(options.options))
        for seed in options.seeds:
            temperature = options.temperature
            config = pretrain_config(["--seed", str(seed), *pretraining])
            untaught = recipes.train_students(out, seed, pretraining, arms, [temperature])
            start = untaught[0].folder
            lessons = collect(out, seed, start, options, write, judge)
            rows = [
                row
                for row in untaught
                if row.chosen_by == "first" and (row.folder != start or row.temperature != 1)
            ]
            rows += taught_rows(out, seed, start, config, lessons, temperature)
            unseen = recipes.unseen_texts(config)
            measures = {}
            for row in rows:
                measure = partial(
                    recipes.measure, row, rubric, recipes.CONFIG, openings, reader, unseen
                )
                measures[row.name] = recipes.measured(out / "rows.jsonl", row.name, seed, measure)
            students.append(measures)
    print_prices(out, options.pairs * len(options.seeds))
    print_table(students, f"before, temperature {options.temperature}")


# ---- the teacher's texts -------------------------------------------------------------------------


def teacher(url: str, model: str) -> Callable[[str], Reply]:
    """A function from a prompt to the reply of a language model."""
    import openai

    client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    def write(prompt: str) -> Reply:
        messages: Any = [{"role": "user", "content": prompt}]
        try:
            answer = client.chat.completions.create(
                model=model, messages=messages, max_tokens=REPLY_TOKENS, temperature=0.7
            )
        except openai.OpenAIError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{url} did not write a text: {reason}; start the command again"
            ) from None
        text = " ".join((answer.choices[0].message.content or "").split())
        usage = answer.usage
        tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        return Reply(text, *tokens)

    return write


def collect(
    out: Path,
    seed: int,
    start: Path,
    options: argparse.Namespace,
    write: Callable[[str], Reply],
    judge: Grader,
) -> dict[str, list[Lesson]]:
    """The lessons by kind of text, after asking the teacher for those that are missing. A
    continuation does not depend on the student, so all seeds have the same."""
    training = Openings(load_openings(recipes.CONFIG.openings), seed=0)
    openings = [training[i] for i in range(max(options.texts, options.pairs))]
    compute = resolve(recipes.CONFIG.device, "auto")
    student, tokenizer = recipes.load_student(start, compute.device)

    def stories(count: int, first_index: int) -> list[Story]:
        with compute.autocast():
            return generate(
                student,
                None,
                tokenizer,
                openings[:count],
                first_index=first_index,
                max_new_tokens=recipes.CONFIG.max_new_tokens,
                temperature=options.temperature,
                seed=seed,
            )

    drafts = stories(len(openings), 0)
    own = drafts[: options.texts]
    path = out / "replies.jsonl"
    known = {(each["kind"], each["seed"], each["index"]): each for each in read_records(path)}
    requests = []  # (key, prompt)
    for kind, prompt in PROMPTS.items():
        asked_by = seed if "{story}" in prompt else 0
        for i, story in enumerate(own):
            text = prompt.format(opening=story.opening, story=story.text)
            requests.append(((kind, asked_by, i), text))
    missing = [(key, text) for key, text in requests if key not in known]
    with open(path, "a") as file, ThreadPoolExecutor(options.concurrency) as pool:
        replies = pool.map(write, [text for _, text in missing])
        for (key, _), reply in zip(missing, replies, strict=True):
            known[key] = dict(zip(("kind", "seed", "index"), key, strict=True)) | reply._asdict()
            file.write(json.dumps(known[key]) + "\n")
            file.flush()
    lessons: dict[str, list[Lesson]] = {}
    for (key, _), story in zip(requests, own * len(PROMPTS), strict=True):
        chosen = known[key]["text"].removeprefix(story.opening).strip()
        lessons.setdefault(key[0], []).append(Lesson(story.opening, chosen, story.text))
    corrections = lessons["correction"]
    others = [*corrections[1:], corrections[0]]
    lessons["shuffled correction"] = [
        lesson._replace(chosen=other.chosen)
        for lesson, other in zip(corrections, others, strict=True)
    ]
    second = stories(options.pairs, len(openings))
    return lessons | preferred(drafts[: options.pairs], second, judge)


def preferred(
    first: Sequence[Story], second: Sequence[Story], judge: Grader
) -> dict[str, list[Lesson]]:
    """The lessons of PAIRS: the story that the judge prefers, of two for the same opening, and one
    of these two at random. Ties, and pairs without an answer, give none."""

    pairs = [
        StoryPair(one.opening, one.text, other.text)
        for one, other in zip(first, second, strict=True)
    ]
    choices, _ = compare(pairs, scores_of(judge))
    lessons = []
    for pair, choice in zip(pairs, choices, strict=True):
        if choice == FIRST:
            lessons.append(Lesson(pair.opening, pair.first, pair.second))
        elif choice == SECOND:
            lessons.append(Lesson(pair.opening, pair.second, pair.first))
    rng = random.Random(0)
    shuffled = [
        lesson._replace(chosen=lesson.rejected, rejected=lesson.chosen)
        if rng.random() < 0.5
        else lesson
        for lesson in lessons
    ]
    return dict(zip(PAIRS, (lessons, shuffled), strict=True))


# ---- learning from them --------------------------------------------------------------------------


def taught_rows(
    out: Path,
    seed: int,
    start: Path,
    config: PretrainConfig,
    lessons: Mapping[str, Sequence[Lesson]],
    temperature: float,
) -> list[Row]:
    """A row for each student that learned from the lessons, after training those that are
    missing."""
    unread = list(
        islice(
            held_out_documents(open_corpus(config.corpus), config.val_fraction, config.seed),
            recipes.COREFERENCE,  # the texts on which students are measured
            None,
        )
    )
    rows = []
    for kind, texts in lessons.items():
        name = kind.replace(" ", "-")
        read, prefers, both = (out / f"{name}-{way}-{seed}" for way in ("read", "prefer", "both"))
        pairs, rewards = pairs_of(texts)
        learn(start, prefers, PREFER, LEARNERS["dpo"], pairs, rewards)
        rows.append(Row(f"{kind}, prefer", prefers, temperature))
        if kind in PAIRS:
            continue
        words = sum(len(lesson.chosen.split()) for lesson in texts)
        mixed = [*texts_of(texts), *first_words(unread, words * CORPUS_SHARE / (1 - CORPUS_SHARE))]
        learn(start, read, READ, READING, mixed, [1.0] * len(mixed))
        learn(read, both, PREFER, LEARNERS["dpo"], pairs, rewards)
        rows += [
            Row(f"{kind}, read", read, temperature),
            Row(f"{kind}, both", both, temperature),
        ]
    words = sum(len(lesson.chosen.split()) for lesson in lessons["correction"])
    more = out / f"real-stories-read-{seed}"
    real = first_words(unread, words / (1 - CORPUS_SHARE))
    learn(start, more, READ, READING, real, [1.0] * len(real))
    return [*rows, Row("as many words of real stories, read", more, temperature)]


def texts_of(lessons: Sequence[Lesson]) -> list[tuple[str, str]]:
    """(opening, text) of the teacher's texts."""
    return [(lesson.opening, lesson.chosen) for lesson in lessons]


def pairs_of(lessons: Sequence[Lesson]) -> tuple[list[tuple[str, str]], list[float]]:
    """The chosen and the rejected text for each opening, and their rewards, 1 and 0."""
    pairs = []
    for lesson in lessons:
        pairs += [(lesson.opening, lesson.chosen), (lesson.opening, lesson.rejected)]
    return pairs, [1.0, 0.0] * len(lessons)


def first_words(documents: Sequence[str], words: float) -> list[tuple[str, str]]:
    """The first documents with this number of words in all, as texts without an opening. Raises
    UserError if there are too few."""
    texts: list[tuple[str, str]] = []
    missing = words
    for document in documents:
        if missing <= 0:
            break
        texts.append(("", document))
        missing -= len(document.split())
    if missing > 0:
        raise UserError(
            f"the corpus has too few held-out words ({missing:.0f} are missing): give a larger corpus"
        )
    return texts


def learn(
    start: Path,
    out: Path,
    options: str,
    learner: Learner,
    texts: Sequence[tuple[str, str]],
    rewards: Sequence[float],
) -> None:
    """Train a student on texts, (opening, text), with rewards, and save it in `out`, unless it is
    there already. In each pass, the texts count as samples of the student before that pass."""
    if checkpoint.newest(out):
        return
    config = interact_config(words_of("options", options))
    compute = resolve(config.device, config.dtype)
    reference, policy, state = load_students(config, compute, checkpoint.find(start))
    policy.learner = learner
    stories = [
        as_story(policy.tokenizer, i, opening, text, reference.config.context)
        for i, (opening, text) in enumerate(texts)
    ]
    for step in range(config.steps):
        batch = ppo.with_reference(policy, collate(stories, compute.device), policy.student)
        batch = replace(batch, logprobs=batch.ref_logprobs)
        batch = ppo.with_reference(policy, batch, reference)
        statistics = ppo.step(policy, batch, rewards, state.kl_coef, step)
        skipped = int(statistics["skipped"])
        print(f"{out}: pass {step + 1}, loss {statistics['policy_loss']:.3f}, {skipped} skipped")
    (out / "checkpoints").mkdir(parents=True)
    policy.save(out / "checkpoints" / f"step_{config.steps:07d}", state)


def as_story(tokenizer: Tokenizer, index: int, opening: str, text: str, context: int) -> Story:
    """A text as a story that the student might have written. Its log-probabilities are not known
    here. A text that stops in the middle of a sentence has no end token. A text that exceeds the
    context is cut."""
    prompt = torch.tensor(encode_opening(tokenizer, opening))
    ids = tokenizer.encode(f" {text}" if opening else text)
    has_end = text.rstrip().endswith(SENTENCE_ENDS)
    if has_end:
        ids = [*ids, tokenizer.eos]
    tokens = torch.tensor(ids[: context - len(prompt)])
    unknown = torch.zeros(len(tokens))
    ended = "eos" if has_end else "length"
    return Story(index, opening, text, prompt, tokens, unknown, unknown, unknown, ended)


# ---- the tables ----------------------------------------------------------------------------------


def print_prices(out: Path, pairs: int) -> None:
    """Print the number of texts of each kind and of pairs, and the words and tokens of each."""
    gain.print_row(["text", "number", "words", "tokens in", "tokens out"])
    gain.print_row(["---"] * 5)
    by_kind: dict[str, list[Record]] = {}
    for reply in read_records(out / "replies.jsonl"):
        by_kind.setdefault(reply["kind"], []).append(reply)
    for kind, replies in by_kind.items():
        words = mean_of(len(reply["text"].split()) for reply in replies)
        tokens = [mean_of(reply[key] for reply in replies) for key in ("tokens_in", "tokens_out")]
        numbers = [len(replies), words, *tokens]
        gain.print_row([kind, *(f"{number:.0f}" for number in numbers)])
    tokens_in, tokens_out, _ = Cache(out / PAIR_REPLIES).charged
    numbers = [pairs, 0, tokens_in / pairs, tokens_out / pairs]
    gain.print_row(["pair", *(f"{number:.0f}" for number in numbers)])


def print_table(students: Sequence[Mapping[str, Record]], before: str) -> None:
    """Print the measures of each row, and its gain in coherence over the row `before`."""
    print()
    gain.print_row(["", "gain in coherence", *gain.SHOWN])
    gain.print_row(["---"] * (2 + len(gain.SHOWN)))
    for name in students[0]:
        gains = [
            gain.paired_gain(student[before]["coherences"], student[name]["coherences"])
            for student in students
        ]
        means = [mean_of(student[name].get(key) for student in students) for key in gain.SHOWN]
        cells = ["" if mean is None else f"{mean:.3f}" for mean in means]
        gain.print_row([name, str(interval(gains)), *cells])


if __name__ == "__main__":
    main()
