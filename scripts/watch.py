"""Watch a run in the terminal: curves, warnings, the last stories and the time left, until the run is over.

python scripts/watch.py runs/interact
python scripts/watch.py runs/pretrain --once
"""

import argparse
import math
import re
import shutil
import sys
import textwrap
import time
from collections import deque
from pathlib import Path

from tinystory.config import add_number
from tinystory.report.charts import number, text_curve
from tinystory.report.page import duration
from tinystory.report.run import column, number_option, time_left
from tinystory.rl.collapse import Watch
from tinystory.run.errors import UserError, command
from tinystory.run.folder import holds_run, is_held, read_config, read_metrics, read_stories
from tinystory.run.paths import usage
from tinystory.run.text import printable

CURVES = {
    "reward_mean": "reward", "held_out_reward": "held-out reward", "score_mean": "score", "kl": "KL, nats per story",
    "story_clusters": "story clusters", "length_mean": "words per story",
    "loss": "loss, nats per token", "val_loss": "validation loss", "tokens_per_s": "tokens per second",
}  # fmt: skip
HEIGHT = 4  # lines of a curve
STORIES = 3
BLOCKS = "▁▂▃▄▅▆▇█"
CLEAR, BOLD, COLOUR, PLAIN = "\x1b[H\x1b[2J", "\x1b[1m", "\x1b[36m", "\x1b[0m"  # legible on light and dark


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=usage(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--once", action="store_true", help="print the page once, as where there is no terminal")
    add_number(parser, "--every", 5.0, "[0.1, 86400]", "seconds between looks at the run's files")
    options = parser.parse_args(argv)
    if not holds_run(options.run):
        raise UserError(f"{options.run} holds no run: give the folder that --out named")
    terminal = sys.stdout.isatty()
    while True:
        start, running = time.monotonic(), is_held(options.run)
        width, height = shutil.get_terminal_size((100, 60))
        lines = page(options.run, width, running)
        if terminal:
            lines = [BOLD + lines[0] + PLAIN, *(re.sub(f"[{BLOCKS}]+", rf"{COLOUR}\g<0>{PLAIN}", x) for x in lines[1:])]
        if options.once or not (terminal and running):
            print("\n".join(lines))
            return
        print(CLEAR + "\n".join(lines[: height - 1]), flush=True)  # what does not fit would scroll the rest away
        time.sleep(max(options.every, 20 * (time.monotonic() - start)))  # at most a twentieth of a processor


def page(run: Path, width: int, running: bool) -> list[str]:
    """The page's lines, of at most `width` characters."""
    metrics, config = read_metrics(run), read_config(run)
    if not metrics:
        return [f"{run}: no step is recorded yet"]
    left = time_left(metrics, config) if running else None
    state = f"running, about {duration(left)} left" if left is not None else "running" if running else "over"
    lines = [f"{run}: step {number(metrics[-1]['step'])}, {state}"]
    watch = Watch(metrics, number_option(config, "kl_target") or math.inf)
    for step, warning in watch.warnings.values():
        lines += ["", *textwrap.wrap(f"warning since step {step}: {warning}", width)]
    across = max(1, min(3, width // 36))
    charts = [chart for key in CURVES if (chart := curve(column(metrics, key), CURVES[key], width // across - 2))]
    for row in (charts[i : i + across] for i in range(0, len(charts), across)):
        lines += ["", *("  ".join(parts).rstrip() for parts in zip(*row, strict=True))]
    for story in deque(read_stories(run), STORIES):
        reward = "no score" if story["reward"] is None else f"reward {story['reward']:.3f}"
        text = printable(f"{story['opening']} {story['story']}")
        lines += ["", f"step {story['step']}, {reward}", *textwrap.wrap(text, min(width, 100))]
    return lines


def curve(values: list[float | None], name: str, width: int) -> list[str]:
    """A chart as lines of `width` characters: its name, with the first value and the last, and the curve; [] without
    values."""
    present = [value for value in values if value is not None]
    drawing = text_curve(present, width, HEIGHT)
    heading = f"{name} {number(present[0])} → {number(present[-1])}" if present else ""
    return [line.ljust(width)[:width] for line in (heading, *drawing.split("\n"))] if present else []


if __name__ == "__main__":
    main()
