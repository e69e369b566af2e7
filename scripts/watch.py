"""Show a run in the terminal until it ends: curves, warnings and the last stories.

python scripts/watch.py                       the newest run under runs/
python scripts/watch.py runs/demo/interact    this run

If the run is finished or the output is a pipe, the page is printed once.
"""

import math
import shutil
import sys
import textwrap
import time
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tinystory.report.before_after import from_start, grade_line
from tinystory.report.charts import number, text_curve
from tinystory.report.run import is_interaction, number_option
from tinystory.run.collapse import CollapseDetector
from tinystory.run.errors import UserError, command
from tinystory.run.folder import holds_run, in_use, newest_run, read_config
from tinystory.run.options import script_parser
from tinystory.run.records import EVALUATIONS, column, read_metrics, read_records, read_stories
from tinystory.run.text import printable

CURVES = {
    "reward_mean": "reward",
    "held_out_reward": "held-out reward",
    "score_mean": "score",
    "kl": "KL, nats",
    "story_clusters": "story clusters",
    "length_mean": "words per story",
    "loss": "loss, nats per token",
    "val_loss": "validation loss",
    "tokens_per_s": "tokens per second",
}
HEADING = 36  # characters
CURVE = 43  # characters
STORIES = 3
STORY = 2000  # maximum characters of a story, and of an opening
PAUSE_S = 5.0
CLEAR = "\x1b[H\x1b[2J"


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "run", type=Path, nargs="?", help="folder of a run (default: the newest run under runs/)"
    )
    run = parser.parse_args(argv).run or newest_run()
    if not holds_run(run):
        raise UserError(f"{run} holds no run: give the --out folder of a train command")
    if not sys.stdout.isatty():
        columns = shutil.get_terminal_size((100, 0)).columns
        print("\n".join(page(run, columns, in_use(run))))
        return
    running = True
    while running:
        start = time.monotonic()
        running = in_use(run)
        print(CLEAR + screen(run, running), flush=True)
        if running:
            # at most a twentieth of a processor
            time.sleep(max(PAUSE_S, 20 * (time.monotonic() - start)))


def screen(run: Path, running: bool) -> str:
    """The page, cut to the terminal's height, so that the first lines do not scroll away."""
    size = shutil.get_terminal_size()
    lines = page(run, size.columns, running)
    rows = size.lines - 1
    if len(lines) > rows:
        lines = [*lines[: rows - 1], "..."]
    return "\n".join(lines)


def page(run: Path, width: int, running: bool) -> list[str]:
    """The lines of the page."""
    metrics = read_metrics(run)
    config = read_config(run)
    last = f"step {number(metrics[-1]['step'])}" if metrics else "no step yet"
    state = "running" if running else "over"
    lines = textwrap.wrap(f"{printable(str(run))}: {last}, {state}", width)

    curves = from_start(run, metrics)
    detector = CollapseDetector(curves, number_option(config, "kl_target") or math.inf)
    for step, warning in detector.warnings.values():
        lines.append("")
        lines += textwrap.wrap(f"Warning at step {step}: {warning}", width)

    if curves:
        lines.append("")
    for key, name in CURVES.items():
        values = [value for value in column(curves, key) if value is not None]
        if values:
            heading = f"{name} {number(values[0])} → {number(values[-1])}"
            lines.append(f"{heading:{HEADING}} {text_curve(values, CURVE)}"[:width])

    interacts = is_interaction(metrics)
    stories = read_stories(run) if interacts else read_records(run / EVALUATIONS)
    for story in deque(stories, STORIES):
        title = f"Step {story['step']}"
        if interacts:
            title = f"{title}, {grade_line(story)}"
        text = printable(f"{story['opening'][:STORY]} {story['story'][:STORY]}")
        lines.append("")
        lines += textwrap.wrap(f"{title}: {text}", width)
    return lines


if __name__ == "__main__":
    main()
