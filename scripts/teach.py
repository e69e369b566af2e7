"""Be the teacher: a page on which you grade the student's stories, and a server for the trainer.

    python scripts/teach.py                      open the page at the printed URL
    python train_interact.py --teacher-url ...   run the printed command in another terminal

You grade 64 stories, and at the end compare 16 pairs of stories from before and after. This takes
about half an hour. Keys 0 to 3 grade, B goes back, S skips, P pauses. Each answer is saved at once
and never asked for again, so you can close and restart this script, the trainer and the page at any
time.
"""

import argparse
import asyncio
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tinystory.human.grading_queue import GradingQueue
from tinystory.human.lesson import Lesson, lesson_folder
from tinystory.human.page_server import serve
from tinystory.human.progress import COMPARED
from tinystory.report import charts, page
from tinystory.run.errors import UserError, command
from tinystory.run.options import add_number, script_parser
from tinystory.teacher.chat_server import PORTS, until_stopped
from tinystory.teacher.grades import Grades
from tinystory.teacher.named_protocols import load_protocol

RUN = Path("runs/teach/interact")
# Evaluations are shown to the person and not graded: COMPARED openings for the comparisons at the
# end, and one opening for each step.
STEPS = 8
EVALUATION = f"--no-eval-graded --eval-stories {COMPARED + STEPS}"
LESSON = f"--teacher-prompt grades --grades 64 --steps {STEPS} {EVALUATION} --max-unscored 0.5"


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add_number(parser, "--port", 8500, PORTS, "port on 127.0.0.1; 0: a free port")
    add(
        "--grades",
        type=Path,
        default=Path("runs/teach/grades.jsonl"),
        metavar="FILE",
        help="file for the grades (default: %(default)s)",
    )
    add(
        "--teacher-prompt",
        default="",
        metavar="FILE",
        help="JSON file with criteria; give the same file to train_interact.py",
    )
    options = parser.parse_args(argv)
    protocol = load_protocol(options.teacher_prompt)
    if not isinstance(protocol, Grades):
        raise UserError(
            f"--teacher-prompt {options.teacher_prompt} asks yes-or-no questions, and the page grades "
            "by levels: give a file with levels for each criterion"
        )
    prompt = ["--teacher-prompt", options.teacher_prompt] if options.teacher_prompt else []
    with contextlib.closing(GradingQueue(options.grades, protocol)) as queue:
        lesson = Lesson(queue, lesson_folder(RUN), LESSON.split(), prompt)
        asyncio.run(_serve(lesson, options))


async def _serve(lesson: Lesson, options: argparse.Namespace) -> None:
    async with serve(lesson, options.port, style=charts.palette() + page.STYLE) as url:
        print(f"open {url} in a browser", flush=True)
        if lesson.is_over():
            print(f"and compare the stories of {lesson.folder}, which is finished", flush=True)
        else:
            print(f"and start: {lesson.command(url)}", flush=True)
        if options.teacher_prompt:
            print(f"or another command with the same --teacher-prompt and --teacher-url {url}/v1")
        await until_stopped()


if __name__ == "__main__":
    main()
