"""Be the teacher: a page on which you read the student's stories and grade them, and an endpoint
for the trainer.

    python scripts/teach.py                      then open the page that it names, and in another
                                                 terminal
    python train_interact.py --teacher-url ...   the command that it prints

Keys 0 to 3 grade; B goes back, S skips, P pauses. Each grade is saved in --grades at once and never
asked for again.
"""

import argparse
import asyncio
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.human.desk import Desk
from tinystory.human.server import serve
from tinystory.report import charts, page
from tinystory.run.errors import command
from tinystory.run.options import add_number, script_parser
from tinystory.teacher.prompt import load_template
from tinystory.teacher.server import PORTS, until_stopped


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add_number(parser, "--port", 8500, PORTS, "port on 127.0.0.1; 0 takes a free one")
    add(
        "--grades",
        type=Path,
        default=Path("runs/teach/grades.jsonl"),
        metavar="FILE",
        help="where grades are kept (default: %(default)s)",
    )
    add(
        "--teacher-prompt",
        default="",
        metavar="FILE",
        help="JSON file of criteria, as for the trainer",
    )
    options = parser.parse_args(argv)
    template = load_template(options.teacher_prompt)
    with contextlib.closing(Desk(options.grades, template)) as desk:
        asyncio.run(_serve(desk, options))


async def _serve(desk: Desk, options: argparse.Namespace) -> None:
    async with serve(desk, options.port, style=charts.palette() + page.STYLE) as url:
        print(f"open {url} in a browser", flush=True)
        flags = "--steps 16 --stories-per-step 8 --eval-every 4 --eval-stories 8 --lam 1 --max-unscored 0.5"
        client = f"python train_interact.py {flags}"
        if options.teacher_prompt:
            client = "the command that sends texts for these criteria, with"
        print(f"and start: {client} --teacher-url {url}/v1", flush=True)
        await until_stopped()


if __name__ == "__main__":
    main()
