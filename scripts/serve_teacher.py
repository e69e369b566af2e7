"""Run the built-in teacher: a server on 127.0.0.1 that grades stories through OpenAI's chat
completions API.

    python scripts/serve_teacher.py                                    fitted to the built-in corpus
    python scripts/serve_teacher.py --corpus my_stories.txt            fitted to your own stories
    python train_interact.py --teacher-prompt grades --teacher-url http://127.0.0.1:8321/v1

The built-in teacher is a rule-based scorer and not a language model. If you have a language model,
use it instead: the API is the same.
"""

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tinystory  # isort: skip  # noqa: F401  (first: it says which package is missing)
from tqdm import tqdm

from tinystory.data.corpus import open_corpus
from tinystory.rubric.rubric import PARTS, Rubric
from tinystory.rubric.rubric_server import serve
from tinystory.run.errors import command
from tinystory.run.options import add_number, script_parser
from tinystory.teacher.chat_server import PORTS, until_stopped

NICENESS = 10


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add_number(parser, "--port", 8321, PORTS, "port on 127.0.0.1; 0: a free port")
    add(
        "--corpus",
        nargs="+",
        default=["builtin"],
        metavar="NAME|FILE",
        help="corpus to which the teacher is fitted (default: builtin)",
    )
    add(
        "--die-with-parent",
        action="store_true",
        help="whether to exit when standard input closes, and to run at low priority once fitted",
    )
    options = parser.parse_args(argv)
    names = " ".join(options.corpus)
    documents = open_corpus(options.corpus).mixed()
    start = time.monotonic()
    print(f"fitting the built-in teacher to {names} ...", file=sys.stderr, flush=True)
    with tqdm(total=PARTS, desc="fitting", unit="part", leave=False, disable=None) as bar:
        rubric = Rubric(documents, bar.update)
    seconds = time.monotonic() - start
    if not options.die_with_parent:  # the parent says what it is
        print(
            f"this teacher is a rule-based scorer, not an LLM, fitted to {names} in {seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    else:
        yield_cores()  # not earlier: the parent waits until the teacher is fitted
    asyncio.run(_serve(rubric, options.port, options.die_with_parent))


def yield_cores() -> None:
    """Give the parent process priority. The parent's threads wait for each other, so a single
    thread without a core stops all of them."""
    os.nice(NICENESS)
    # Linux divides cores among sessions first, and this process is in a session without a terminal
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(NICENESS))


async def _serve(rubric: Rubric, port: int, die_with_parent: bool) -> None:
    async with serve(rubric, port) as url:
        print(f"listening on {url}/v1", flush=True)
        await until_stopped(or_stdin_closed=die_with_parent)


if __name__ == "__main__":
    main()
