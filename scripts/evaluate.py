"""Evaluate checkpoints: BabyLM's zero-shot tasks, bits per byte, and measures of the stories.

    python scripts/evaluate.py runs/pretrain --blimp blimp_filtered --out report.json
    python scripts/evaluate.py runs/pretrain/checkpoints/chck_* --stories 200 --corpus builtin --out report.json
    python scripts/evaluate.py --compare runs/interact --teacher-url URL     which stories does an LLM prefer, blindly:
                                                                             those before interaction, or after it?
    python scripts/evaluate.py --compare A B --teacher-url URL               ... those of checkpoint A, or of B?

CHECKPOINT is a checkpoint, a run (its best or newest checkpoint), or a folder that transformers wrote. The data files
are BabyLM's own, gzipped or not, and the measures are defined as in its pipeline, to the pair. An .html page is written
beside --out.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from tinystory.config import SEEDS, InteractConfig, add_number
from tinystory.data.corpus import open_corpus
from tinystory.data.openings import load_openings
from tinystory.evaluate.coreference import coreference, unseen_stories
from tinystory.evaluate.pairs import evaluate_pairs, evaluate_wug
from tinystory.evaluate.preference import COMPARISON, Pair, compare, keep_choices, pair_of, run_pairs
from tinystory.evaluate.reader import Reader
from tinystory.evaluate.reading import evaluate_reading
from tinystory.evaluate.scoring import bits_per_byte
from tinystory.evaluate.stories import OPENINGS, GradeStories, story_measures
from tinystory.ops.compute import pick_device
from tinystory.report.evaluation import comparison
from tinystory.report.judges import with_ends
from tinystory.report.run import write_report
from tinystory.rubric.process import builtin_teacher
from tinystory.run.errors import UserError, command
from tinystory.run.folder import atomic_write
from tinystory.run.paths import usage
from tinystory.student import checkpoint, memory
from tinystory.student.generate import generate
from tinystory.teacher.client import Teacher
from tinystory.teacher.grader import open_grader

TASKS = {
    "blimp": (evaluate_pairs, "BLiMP: a .jsonl file, or a folder of them"),
    "supplement": (evaluate_pairs, "BLiMP's supplement"),
    "entity_tracking": (evaluate_pairs, "entity tracking"),
    "wug": (evaluate_wug, "wug test of adjective nominalisation"),
    "reading": (evaluate_reading, "reading_data.csv"),
}
COMPARED = 40  # pairs, if --stories does not say
FEWER = "--stories or --max-new-tokens"


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=usage(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT")
    parser.add_argument(
        "--compare", nargs="+", type=Path, metavar="RUN|A B", help="pairs of stories to judge, each in both orders"
    )
    for task, (_, text) in TASKS.items():
        parser.add_argument(f"--{task.replace('_', '-')}", metavar="PATH", help=text)
    parser.add_argument(
        "--corpus",
        nargs="+",
        metavar="NAME|FILE",
        help="text for bits per byte, for the measure of copying, and for the built-in teacher",
    )
    add_number(parser, "--coreference", 0, "[0, 100000]", "unseen built-in stories to measure coreference on")
    add_number(parser, "--stories", 0, "[0, 1e9]", "stories to write and measure")
    parser.add_argument("--reader", metavar="NAME", help="measure their sense too: smollm2, or a causal language model")
    parser.add_argument("--openings", metavar="FILE", help="their openings, one per line (default: eight built-in)")
    add_number(parser, "--max-new-tokens", InteractConfig.max_new_tokens, "[1, 1e6]", "longest story, in tokens")
    add_number(parser, "--temperature", InteractConfig.temperature, "[0, 100]", "at which they are sampled")
    parser.add_argument("--teacher-url", nargs="+", default=[], help="teacher that scores them (default: built in)")
    parser.add_argument("--teacher-model", nargs="+", default=[], help="model name (default: the first listed)")
    add_number(parser, "--teacher-concurrency", InteractConfig.teacher_concurrency, "[1, 10000]", "requests in flight")
    add_number(parser, "--seed", 0, SEEDS, "seed of the stories and of the teacher")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="report.json to write")
    options = parser.parse_args(argv)
    tasks = {task: getattr(options, task) for task in TASKS if getattr(options, task)}
    if options.compare:
        compare_stories(options)
        return
    if not options.checkpoints or not (tasks or options.corpus or options.stories or options.coreference):
        raise UserError(
            "nothing to evaluate: name a checkpoint or a run (two with --compare), and give --blimp or another task, "
            "--corpus, --coreference N or --stories N"
        )
    corpus = open_corpus(options.corpus) if options.corpus else None
    openings = load_openings(options.openings) if options.openings else OPENINGS
    device = pick_device(options.device)

    records = []
    with contextlib.ExitStack() as stack:
        grade = open_teacher(options, stack) if options.stories else None
        read = Reader(options.reader, options.device).measures if options.reader else None
        for folder in tqdm([checkpoint.find(path) for path in options.checkpoints], desc="checkpoints", disable=None):
            student, tokenizer, facts = checkpoint.load(folder, device)
            words = facts.get("words", 0) + facts.get("interaction_words_in", 0)
            record: dict[str, Any] = {"name": name_of(folder), "checkpoint": str(folder), "words": words or None}
            for task, path in tasks.items():
                record[task] = TASKS[task][0](student, tokenizer, path)
            if options.coreference:
                record["coreference"] = coreference(student, tokenizer, unseen_stories(options.coreference))
            if seen := set(options.corpus or []) & set(facts.get("corpus", [])):
                print(f"{record['name']}: it was trained on {', '.join(sorted(seen))}, so that is no test of it")
            if corpus:
                record["corpus"] = bits_per_byte(student, tokenizer, corpus)
            if options.stories:
                memory.require_for_stories(options.stories, options.max_new_tokens, student.config, device, FEWER)
                record["stories"] = story_measures(
                    student, tokenizer, openings=openings, n_stories=options.stories, corpus=corpus, grade=grade,
                    max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed,
                    read=read,
                )  # fmt: skip
            records.append(record)
    rows = comparison(records)
    width = max(len(row[0]) for row in rows)
    print(" " * width, *(f"{record['name']:>24}" for record in records))
    for first, *cells in rows:
        print(f"{first:<{width}}", *(f"{cell:>24}" for cell in cells))
    for record in records:
        if left_out := {task: record[task]["too_long"] for task in tasks if record[task].get("too_long")}:
            print(f"{record['name']}: items longer than its context, left out: {left_out}")
    if options.out:
        text = json.dumps({"tasks": tasks, "corpus": options.corpus, "checkpoints": records}, indent=1) + "\n"
        options.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(options.out, text)


def compare_stories(options: argparse.Namespace) -> None:
    """Ask the teacher which stories are better, each pair in both orders, and print the win rate of the second ones.
    Choices about a run's own stories are kept there, for its report."""
    if len(options.compare) > 2 or options.checkpoints:
        raise UserError("--compare takes one run, or two checkpoints, and nothing else is evaluated with it")
    if not options.teacher_url:
        raise UserError("--compare needs --teacher-url: the built-in teacher scores stories, it cannot compare them")
    run = options.compare[0] if len(options.compare) == 1 else None
    pairs = run_pairs(run) if run else student_pairs(options.compare[0], options.compare[1], options)
    with Teacher(
        options.teacher_url,
        options.teacher_model or None,
        concurrency=options.teacher_concurrency,
        seed=options.seed,
        template=COMPARISON,
        cache=run / "comparison_replies.jsonl" if run else None,
    ) as teacher:
        result = compare(pairs, lambda stories: [grade.score for grade in teacher.grade_each(stories)])
        by = str(teacher.model)
    names = ("before", "after") if run else tuple(name_of(checkpoint.find(path)) for path in options.compare)
    if not result["pairs"]:
        raise UserError(f"{by} compared none of {len(pairs)} pairs: see scripts/doctor.py --teacher-url URL")
    print(
        f"{by} preferred {names[1]} in {result['second']} of {result['pairs']} pairs, {names[0]} in {result['first']}; "
        f"in {result['same']} the answer depended on the order, a tie. Win rate of {names[1]}: "
        f"{with_ends(result['rate'], result['ci'])}"
    )
    print(
        f"it preferred whatever came second in {result['second_place']:.0%} of its answers (50 % without a bias)"
        + (f"; {result['unscored']} pairs without an answer" if result["unscored"] else "")
    )
    if run:
        keep_choices(run, by, pairs, result["choices"])
        print(f"report: {write_report(run)}")


def student_pairs(first: Path, second: Path, options: argparse.Namespace) -> list[Pair]:
    """Stories of two students to the same openings, with the same random numbers."""
    openings = load_openings(options.openings) if options.openings else OPENINGS
    device, count, stories = pick_device(options.device), options.stories or COMPARED, []
    for path in (first, second):
        student, tokenizer, _ = checkpoint.load(checkpoint.find(path), device)
        memory.require_for_stories(count, options.max_new_tokens, student.config, device, FEWER)
        prompts = [openings[i % len(openings)] for i in range(count)]
        sampling = dict(max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed)
        stories.append(generate(student, None, tokenizer, prompts, first_index=0, **sampling))
    pairs = [pair_of(a.opening, a.text, b.text) for a, b in zip(*stories, strict=True) if a.text != b.text]
    if not pairs:
        raise UserError(f"{first} and {second} tell the same stories: there is nothing to compare")
    return pairs


def name_of(folder: Path) -> str:
    """RUN/chck_1M for RUN/checkpoints/chck_1M, else the folder's own name."""
    folder = folder.resolve()
    return f"{folder.parents[1].name}/{folder.name}" if folder.parent.name == "checkpoints" else folder.name


def open_teacher(options: argparse.Namespace, stack: contextlib.ExitStack) -> GradeStories:
    """A teacher for as long as the stack lasts."""
    config = InteractConfig(
        teacher_url=options.teacher_url,
        teacher_model=options.teacher_model,
        teacher_concurrency=options.teacher_concurrency,
        seed=options.seed,
    )
    grader = stack.enter_context(open_grader(config, builtin_teacher, corpus=options.corpus or ["builtin"]))
    return lambda opening, stories: [grade.scores for grade in grader.grade(opening, stories)]


if __name__ == "__main__":
    main()
