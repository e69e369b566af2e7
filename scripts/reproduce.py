"""The paper's experiment as one command: does interaction replace pretraining on many times as many words?

    python scripts/reproduce.py --scale tiny             takes minutes: shows the output, proves nothing
    python scripts/reproduce.py --scale small --corpus stories.txt --out runs/small
    python scripts/reproduce.py --scale rehearsal        every step and part of `paper`, with a toy student
    python scripts/reproduce.py --scale paper --teacher-url http://127.0.0.1:8000/v1

One student is pretrained, with a checkpoint at every milestone of words. From some of these it continues in three ways:

    interact   it writes stories and the teacher scores them, for several seeds
    random     the same with scores drawn from a hash of the story: everything but the teacher's judgement
    reading    pretraining on as many further words as interaction took in and wrote, the learning rate decaying to 0

The reward is the paper's, for a single opening, or with --objective demo that of train_interact.py's defaults: many
openings, and a higher reward for a story that differs from the others and for one that ends.

Every checkpoint then writes stories with the same random numbers, the teacher grades them, and OUT/report.html compares
them. Every part is a run of train_pretrain.py or train_interact.py in its own folder. Finished parts are not run again
and interrupted ones are resumed, so after Ctrl-C or a kill the same command continues.
"""

import argparse
import dataclasses
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tinystory  # isort: skip  # noqa: F401  (before torch: it sets up OpenMP's threads)
import torch

from tinystory.config import InteractConfig, add_number
from tinystory.run.errors import command
from tinystory.studies.reproduce import OBJECTIVES, SCALES, reproduce


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="tiny")
    add("--out", type=Path, help="folder of the experiment (default: runs/reproduce-SCALE)")
    add("--corpus", nargs="+", metavar="NAME", help="corpora for pretraining (default: set by --scale)")
    add("--teacher-url", nargs="+", default=[], help="OpenAI-compatible endpoint (default: built in)")
    add("--teacher-model", nargs="+", default=[], help="model name (default: the first listed)")
    add_number(parser, "--teacher-concurrency", InteractConfig.teacher_concurrency, "[1, 10000]", "requests in flight")
    add("--milestones", nargs="+", type=int, metavar="M", help="starts of interaction, million words")
    add_number(parser, "--seeds", 0, "[0, 1000]", "interactions per milestone; 0: as --scale has it")
    add_number(parser, "--steps", 0, "[0, 1e6]", "PPO steps per interaction; 0: as --scale has it")
    add("--objective", choices=OBJECTIVES, default="paper", help="reward and openings (default: paper)")
    add("--blimp", default="", help="folder of BLiMP's .jsonl files, evaluated too")
    add("--device", default="auto")
    add_number(parser, "--jobs", 0, "[0, 1000]", "parallel parts; 0: one per core, or one on a GPU")
    options = parser.parse_args(argv)

    scale, objective = SCALES[options.scale], OBJECTIVES[options.objective]
    scale = dataclasses.replace(
        scale,
        pretrain=scale.pretrain | ({"corpus": options.corpus} if options.corpus else {}),
        interact=objective | scale.interact | ({"steps": options.steps} if options.steps else {}),
        starts=tuple(options.milestones or scale.starts),
        seeds=options.seeds or scale.seeds,
    )
    teacher = {name: value for name in ("teacher_url", "teacher_model") if (value := getattr(options, name))}
    teacher |= {"teacher_concurrency": options.teacher_concurrency} if options.teacher_url else {}
    jobs = options.jobs or (1 if torch.cuda.is_available() else torch.get_num_threads())
    out = options.out or Path("runs") / f"reproduce-{options.scale}"
    print(f"objective {options.objective}: {', '.join(f'{name} {value!r}' for name, value in objective.items())}")
    # Treat kill PID like Ctrl-C: the parts save a checkpoint.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings = dict(name=options.scale, device=options.device, blimp=options.blimp)
    print(f"report: {reproduce(scale, out, teacher, jobs=jobs, **settings)}")


if __name__ == "__main__":
    main()
