"""Print stories by the student of a checkpoint.

python scripts/sample.py                   by the best checkpoint of the newest run under runs/
python scripts/sample.py runs/demo/pretrain --opening "One day, a small dragon"
python scripts/sample.py runs/demo/interact --stories 100 --out ours.jsonl   for scripts/evaluate.py

In a terminal, without --opening, the command then asks for openings of your own.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tinystory.config.base import SEEDS
from tinystory.data.openings import Openings, load_openings
from tinystory.run.errors import UserError, command
from tinystory.run.files import atomic_write
from tinystory.run.folder import newest_run, require_output
from tinystory.run.options import add_number, script_parser
from tinystory.run.paths import hint
from tinystory.run.terminal import story_text
from tinystory.run.text import printable
from tinystory.storyteller import Storyteller, load
from tinystory.student.generate import Story


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "checkpoint",
        nargs="?",
        type=Path,
        help="folder of a checkpoint or a run (its checkpoint `best`, or else the newest)",
    )
    add(
        "--opening",
        help="beginning of every story, or a file with one opening per line (default: built-in held-out openings)",
    )
    add_number(parser, "--stories", 5, "[1, 1e6]", "number of stories")
    add_number(
        parser,
        "--max-new-tokens",
        0,
        "[0, 1e6]",
        "maximum tokens of a story; 0: up to the student's context",
    )
    add_number(
        parser,
        "--temperature",
        1.0,
        "[0, 100]",
        "sampling temperature; 1: the student's own distribution; 0: greedy decoding",
    )
    add_number(
        parser, "--top-k", 0, "[0, 1e9]", "number of most probable tokens to sample from; 0: all"
    )
    add_number(
        parser,
        "--top-p",
        1.0,
        "(0, 1]",
        "total probability of the tokens to sample from (nucleus sampling)",
    )
    add_number(parser, "--seed", 0, SEEDS, "seed of the stories")
    add("--device", default="auto")
    add(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="file to write the stories to, for scripts/evaluate.py",
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    if options.out:
        require_output(options.out)

    storyteller = load(options.checkpoint or newest_run(), device=options.device)
    openings = load_openings(options.opening or "builtin")
    if not options.opening:
        openings = Openings(openings, seed=0).held_out
    stories = continuations(storyteller, openings, 0, options)
    if options.out:
        lines = []
        for story in stories:
            record = {"opening": story.opening, "story": story.text, "ended": story.ended}
            lines.append(json.dumps(record) + "\n")
        atomic_write(options.out, "".join(lines))
        print(printable(f"{len(lines)} stories are in {options.out}"))
        print(f"to evaluate them: {hint('scripts/evaluate.py', options.out)}")
        return
    print_stories(stories)
    if not options.opening and sys.stdin.isatty() and sys.stdout.isatty():
        for number, opening in enumerate(iter(typed_opening, ""), 1):
            try:
                first_index = number * options.stories
                print_stories(continuations(storyteller, [opening], first_index, options))
            except UserError as error:  # such as an opening that is too long
                print(f"error: {error}")


def typed_opening() -> str:
    """The opening that the user types; "" at Ctrl-D."""
    try:
        return printable(input("Your opening (press Enter to end): ")).strip()
    except EOFError:
        print()  # the prompt's line has no end
        return ""


def print_stories(stories: Sequence[Story]) -> None:
    for number, story in enumerate(stories, 1):
        cut_off = "" if story.ended == "eos" else ", cut off"
        print(f"--- story {number}, {story.words} words{cut_off}")
        print(story_text(story.opening, story.text))
        print()


def continuations(
    storyteller: Storyteller,
    texts: Sequence[str],
    first_index: int,
    options: argparse.Namespace,
) -> list[Story]:
    """--stories stories; the texts are used as openings in turn."""
    return storyteller.generate(
        list(islice(cycle(texts), options.stories)),
        first_index=first_index,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )


if __name__ == "__main__":
    main()
