"""Watch a run in the terminal until it ends: curves, warnings, the last stories and the time left.

python scripts/watch.py                     the newest run under runs/
python scripts/watch.py runs/interact       a finished run, or output to a pipe, is printed once
"""

import math
import shutil
import sys
import textwrap
import time
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.report.before_after import from_start
from tinystory.report.charts import number, text_curve
from tinystory.report.run import column, number_option, remaining
from tinystory.run.collapse import CollapseDetector
from tinystory.run.errors import UserError, command
from tinystory.run.folder import (
    holds_run,
    in_use,
    newest_run,
    read_config,
    read_metrics,
    read_stories,
)
from tinystory.run.options import script_parser
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
HEADING, CURVE = 36, 43  # characters
STORIES, STORY = 3, 2000  # stories shown, and characters of each
PAUSE_S = 5.0
CLEAR = "\x1b[H\x1b[2J"


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "run", type=Path, nargs="?", help="folder of a run (default: the newest under runs/)"
    )
    run = parser.parse_args(argv).run or newest_run()
    if not holds_run(run):
        raise UserError(f"{run} holds no run: give the folder that --out named")
    terminal = sys.stdout.isatty()
    while (running := in_use(run)) and terminal:
        start = time.monotonic()
        print(CLEAR + screen(run, running), flush=True)
        # at most a twentieth of a processor
        time.sleep(max(PAUSE_S, 20 * (time.monotonic() - start)))
    columns = shutil.get_terminal_size((100, 0)).columns
    print(CLEAR + screen(run, running) if terminal else "\n".join(page(run, columns, running)))


def screen(run: Path, running: bool) -> str:
    """The page, cut to the terminal's height: more would scroll the first lines away."""
    size = shutil.get_terminal_size()
    lines, rows = page(run, size.columns, running), size.lines - 1
    return "\n".join(lines if len(lines) <= rows else [*lines[: rows - 1], "..."])


def page(run: Path, width: int, running: bool) -> list[str]:
    metrics, config = read_metrics(run), read_config(run)
    last = f"step {number(metrics[-1]['step'])}" if metrics else "no step yet"
    lines = textwrap.wrap(
        f"{printable(str(run))}: {last}, {remaining(metrics, config) if running else 'over'}", width
    )
    for step, warning in CollapseDetector(
        metrics, number_option(config, "kl_target") or math.inf
    ).warnings.values():
        lines += ["", *textwrap.wrap(f"Warning at step {step}: {warning}", width)]
    curves = from_start(run, metrics)
    lines += [""] * bool(curves)
    for key, name in CURVES.items():
        if values := [value for value in column(curves, key) if value is not None]:
            heading = f"{name} {number(values[0])} → {number(values[-1])}"
            lines.append(f"{heading:{HEADING}} {text_curve(values, CURVE)}"[:width])
    for story in deque(read_stories(run), STORIES):
        reward = "no score" if story["reward"] is None else f"reward {story['reward']:.3f}"
        text = printable(f"{story['opening'][:STORY]} {story['story'][:STORY]}")
        lines += ["", *textwrap.wrap(f"Step {story['step']}, {reward}: {text}", width)]
    return lines


if __name__ == "__main__":
    main()
