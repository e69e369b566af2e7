"""The paper's experiment as one command: does interaction replace pretraining on many times as many words?

    python scripts/reproduce.py --scale tiny             takes minutes: shows the output, proves nothing
    python scripts/reproduce.py --scale small --pretrain "--corpus stories.txt" --out runs/small
    python scripts/reproduce.py --scale paper --teacher "--teacher-url http://127.0.0.1:8000/v1"

One student is pretrained, with a checkpoint at every milestone of words. From some of these it continues in three ways:

    interact   it writes stories and the teacher scores them, for several seeds
    random     the same with a control, here a random score (--controls: values of train_interact.py's --reward)
    more       pretraining on as many further words as interaction took in and wrote, the learning rate decaying to 0

The reward is the paper's, for a single opening, unless --interact has other options. Every checkpoint then writes
stories with the same random numbers, the teacher grades them, and OUT/report.html compares them.

Every run is one of train_pretrain.py or train_interact.py in its own folder. Finished runs are not run again and
interrupted ones are resumed, so after Ctrl-C or a kill the same command continues.
"""

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.run.errors import command
from tinystory.run.options import add_number
from tinystory.studies.reproduce import SCALES, reproduce


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="tiny")
    add("--out", type=Path, help="folder of the experiment (default: runs/reproduce-SCALE)")
    add("--pretrain", default="", metavar="TEXT", help="options of train_pretrain.py, over those of the scale")
    add("--interact", default="", metavar="TEXT", help="options of train_interact.py, over those of the scale")
    add("--teacher", default="", metavar="TEXT", help="further ones, that name the teacher (default: built in)")
    add("--controls", nargs="*", default=["random"], metavar="REWARD", help="interactions for these (default: random)")
    add("--milestones", nargs="+", type=int, metavar="M", help="starts of interaction, million words")
    add_number(parser, "--seeds", 0, "[0, 1000]", "interactions per milestone and arm; 0: as --scale has it")
    add_number(parser, "--stories", 0, "[0, 1e6]", "stories of an evaluation; 0: as --scale has it")
    add("--blimp", default="", help="folder of BLiMP's .jsonl files, evaluated too")
    add("--device", default="auto")
    options = parser.parse_args(argv)

    scale = SCALES[options.scale]
    scale = replace(
        scale,
        pretrain=f"{scale.pretrain} {options.pretrain}".strip(),
        interact=f"{scale.interact} {options.interact}".strip(),
        starts=tuple(options.milestones or scale.starts),
        seeds=options.seeds or scale.seeds,
        stories=options.stories or scale.stories,
    )
    # Treat kill PID like Ctrl-C: the runs save a checkpoint.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings = {name: getattr(options, name) for name in ("teacher", "controls", "device", "blimp")}
    print(f"report: {reproduce(scale, options.out or Path('runs') / f'reproduce-{options.scale}', **settings)}")


if __name__ == "__main__":
    main()
