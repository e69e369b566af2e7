"""Print stories by a checkpoint's student.

python scripts/sample.py                   by the best checkpoint of the newest run under runs/
python scripts/sample.py runs/pretrain/checkpoints/chck_1M --opening "One day, a small dragon"
python scripts/sample.py --best-of 4       each the best of four, by the student's own likelihood
python scripts/sample.py --best-of 4 --teacher-url URL     ... by reward, with a teacher's score
"""

import argparse
import json
import sys
import textwrap
from itertools import cycle, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.config import SEEDS, InteractConfig, check
from tinystory.data.openings import Openings, load_openings
from tinystory.evaluate.stories import best_of_n
from tinystory.ops.compute import pick_device
from tinystory.rl.reward import story_rewards
from tinystory.run.errors import command
from tinystory.run.files import atomic_write
from tinystory.run.folder import newest_run, require_output
from tinystory.run.options import add_number, script_parser
from tinystory.run.text import printable
from tinystory.student import checkpoint, memory
from tinystory.student.generate import Story, encode_opening, generate
from tinystory.teacher.grader import open_grader


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "checkpoint",
        nargs="?",
        type=Path,
        help="folder of a checkpoint or a run (its best or newest)",
    )
    add(
        "--opening",
        help="beginning of every story, or a file of some (default: built-in, held out)",
    )
    add_number(parser, "--stories", 5, "[1, 1e9]", "number of stories")
    add_number(parser, "--max-new-tokens", 0, "[0, 1e6]", "longest story; 0: up to the context")
    add_number(
        parser, "--temperature", InteractConfig.temperature, "[0, 100]", "0 is greedy decoding"
    )
    add_number(parser, "--top-k", 0, "[0, 1e9]", "keep the k most probable tokens; 0: all")
    add_number(parser, "--top-p", 1.0, "(0, 1]", "nucleus sampling: probability to keep")
    add_number(parser, "--seed", 0, SEEDS, "seed of the stories")
    add_number(
        parser, "--best-of", 1, "[1, 1000]", "stories per opening, of which the best is printed"
    )
    for name in ("--teacher-url", "--teacher-model", "--reward"):
        add(
            name,
            default="",
            help="who chooses it, as in train_interact.py (default: its likelihood)",
        )
    add("--device", default="auto")
    add("--out", type=Path, metavar="FILE.jsonl", help="write the stories there, for evaluate.py")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    config = InteractConfig(reward=options.reward, seed=options.seed)
    if options.teacher_url:
        config.teacher_url = [options.teacher_url]
    if options.teacher_model:
        config.teacher_model = [options.teacher_model]
    check(config)
    if options.out:
        require_output(options.out)

    stories = best_stories(write_stories(options), options.stories, config)
    if options.out:
        lines = []
        for story in stories:
            record = {"opening": story.opening, "story": story.text, "ended": story.ended}
            lines.append(json.dumps(record) + "\n")
        atomic_write(options.out, "".join(lines))
        return
    for number, story in enumerate(stories, 1):
        cut_off = "" if story.ended == "eos" else ", cut off"
        print(f"--- story {number}, {story.words} words{cut_off}")
        for paragraph in printable(f"{story.opening} {story.text}").split("\n"):
            print(textwrap.fill(paragraph, 100))
        print()


def write_stories(options: argparse.Namespace) -> list[Story]:
    """--best-of times --stories; the n-th of each round share their opening."""
    folder = checkpoint.find(options.checkpoint or newest_run())
    device = pick_device(options.device)
    student, tokenizer, _ = checkpoint.load(folder, device)
    count = options.stories * options.best_of
    advice = "--stories, --best-of or --max-new-tokens"
    memory.require_for_stories(count, options.max_new_tokens or 1, student.config, device, advice)

    texts = load_openings(options.opening or "builtin")
    if not options.opening:
        texts = Openings(texts, seed=0).held_out
    openings = list(islice(cycle(texts), options.stories)) * options.best_of
    longest = max(len(encode_opening(tokenizer, opening)) for opening in openings)
    room = max(student.config.context - longest, 1)
    return generate(
        student,
        None,
        tokenizer,
        openings,
        first_index=0,
        max_new_tokens=options.max_new_tokens or room,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )


def best_stories(stories: list[Story], count: int, config: InteractConfig) -> list[Story]:
    """The best story of each of the `count` openings, by reward, or without a teacher by the
    student's likelihood."""
    if len(stories) == count:
        return stories
    values: list[Any] = [story.likelihood for story in stories]
    if config.teacher_url or config.reward:
        with open_grader(config, corpus=None) as grader:
            grades = grader.grade_each([(story.opening, story.text) for story in stories])
        values = story_rewards(config, stories, [grade.score for grade in grades])
    return [stories[i] for i in best_of_n(values, count)]


if __name__ == "__main__":
    main()
