"""Print stories by a checkpoint's student.

python scripts/sample.py                                   by the best checkpoint of the newest run
under runs/
python scripts/sample.py runs/pretrain/checkpoints/chck_1M --opening "One day, a small dragon"
--stories 3
python scripts/sample.py --best-of 4                       each the best of four, by the student's
own likelihood
python scripts/sample.py --best-of 4 --teacher-url URL     ... by reward, with a teacher's score
"""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.config import SEEDS, InteractConfig, check
from tinystory.data.openings import Openings, load_openings
from tinystory.evaluate.stories import best_of_n
from tinystory.ops.compute import pick_device
from tinystory.rl.reward import story_rewards
from tinystory.run.errors import command
from tinystory.run.folder import atomic_write, newest_run, require_output
from tinystory.run.options import add_number, script_parser
from tinystory.run.text import printable
from tinystory.student import checkpoint, memory
from tinystory.student.generate import encode_opening, generate
from tinystory.teacher.grader import open_grader


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        help="folder of a checkpoint or a run (its best or newest)",
    )
    parser.add_argument(
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
        parser.add_argument(
            name,
            default="",
            help="who chooses it, as in train_interact.py (default: its likelihood)",
        )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.jsonl", help="write the stories there, for evaluate.py"
    )
    options = parser.parse_args(argv)
    urls, models = ([text] if text else [] for text in (options.teacher_url, options.teacher_model))
    config = InteractConfig(
        teacher_url=urls, teacher_model=models, reward=options.reward, seed=options.seed
    )
    check(config)

    if options.out:
        require_output(options.out)
    folder = checkpoint.find(options.checkpoint or newest_run())
    device = pick_device(options.device)
    student, tokenizer, _ = checkpoint.load(folder, device)
    tokens = options.max_new_tokens or 1
    count, advice = options.stories * options.best_of, "--stories, --best-of or --max-new-tokens"
    memory.require_for_stories(count, tokens, student.config, device, advice)
    texts = (
        load_openings(options.opening)
        if options.opening
        else Openings(load_openings("builtin"), seed=0).held_out
    )
    openings = [texts[i % len(texts)] for i in range(options.stories)] * options.best_of
    room = student.config.context - max(
        len(encode_opening(tokenizer, opening)) for opening in openings
    )
    sampling = {name: getattr(options, name) for name in ("seed", "temperature", "top_k", "top_p")}
    sampling |= {"max_new_tokens": options.max_new_tokens or max(room, 1)}
    stories = generate(student, None, tokenizer, openings, first_index=0, **sampling)
    if options.best_of > 1:
        values: list[Any] = [story.likelihood for story in stories]
        if urls or options.reward:
            with open_grader(config, corpus=None) as grader:
                grades = grader.grade_each([(story.opening, story.text) for story in stories])
            values = list(story_rewards(config, stories, [grade.score for grade in grades]))
        stories = [stories[i] for i in best_of_n(values, options.stories)]
    if options.out:
        lines = [
            {"opening": story.opening, "story": story.text, "ended": story.ended}
            for story in stories
        ]
        atomic_write(options.out, "".join(json.dumps(line) + "\n" for line in lines))
        return
    for number, story in enumerate(stories, 1):
        print(
            f"--- story {number}, {story.words} words"
            + ("" if story.ended == "eos" else ", cut off")
        )
        for paragraph in printable(f"{story.opening} {story.text}").split("\n"):
            print(textwrap.fill(paragraph, 100))
        print()


if __name__ == "__main__":
    main()
