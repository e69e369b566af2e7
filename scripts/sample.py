"""Print stories by the student of a checkpoint.

python scripts/sample.py                   by the best checkpoint of the newest run under runs/
python scripts/sample.py runs/demo/pretrain --opening "One day, a small dragon"
python scripts/sample.py runs/demo/interact --stories 100 --out ours.jsonl   for scripts/evaluate.py
"""

import argparse
import json
import sys
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tinystory.config.base import SEEDS
from tinystory.data.openings import Openings, load_openings
from tinystory.run.errors import command
from tinystory.run.files import atomic_write
from tinystory.run.folder import newest_run, require_output
from tinystory.run.options import add_number, script_parser
from tinystory.run.paths import hint
from tinystory.run.terminal import story_text
from tinystory.run.text import printable
from tinystory.storyteller import load


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
    stories = storyteller.generate(
        list(islice(cycle(openings), options.stories)),
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    if options.out:
        lines = []
        for story in stories:
            record = {"opening": story.opening, "story": story.text, "ended": story.ended}
            lines.append(json.dumps(record) + "\n")
        atomic_write(options.out, "".join(lines))
        print(printable(f"{len(lines)} stories are in {options.out}"))
        print(f"to evaluate them: {hint('scripts/evaluate.py', options.out)}")
        return
    for number, story in enumerate(stories, 1):
        cut_off = "" if story.ended == "eos" else ", cut off"
        print(f"--- story {number}, {story.words} words{cut_off}")
        print(story_text(story.opening, story.text))
        print()


if __name__ == "__main__":
    main()
