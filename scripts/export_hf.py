"""Write a checkpoint for transformers, or for llama.cpp, Ollama and LM Studio.

    python scripts/export_hf.py RUN exported                    its best or newest checkpoint
    python scripts/export_hf.py RUN --gguf student.gguf         ... as a file of GGUF
    python scripts/export_hf.py RUN exported --all-checkpoints  exported/chck_1M, exported/chck_2M, ...

Each folder has a model card, README.md, written from the records of the run. `hf upload NAME/REPO
exported` puts it on the Hub, and `hf upload NAME/REPO exported/chck_1M --revision chck_1M` a
milestone on its branch. For a local folder BabyLM's pipeline ignores --revision_name: give it one
per milestone.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from tinystory.report.card import model_card
from tinystory.run.errors import UserError, command
from tinystory.run.files import atomic_folder, atomic_write
from tinystory.run.folder import require_output
from tinystory.run.options import script_parser
from tinystory.student import checkpoint, gguf, hf
from tinystory.student.model import Student

MAIN = "main"  # the best or newest checkpoint, by the name of the Hub's default branch


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "checkpoint", type=Path, help="folder of a checkpoint, or of a run (its best or newest one)"
    )
    add("folder", type=Path, nargs="?", help="new folder to write")
    add("--gguf", type=Path, metavar="FILE", help="file of GGUF to write")
    add(
        "--all-checkpoints",
        action="store_true",
        help="write all chck_* of the run, one folder each",
    )
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    needs_folder = options.all_checkpoints or not options.gguf
    if needs_folder and not options.folder:
        raise UserError("there is nothing to write: give a new folder, or --gguf FILE alone")
    best = checkpoint.find(options.checkpoint)
    sources: dict[str, Path] = {}  # by the name of the folder to write
    if options.all_checkpoints:
        for path in milestones(options.checkpoint):
            sources[path.name] = path
    sources[MAIN] = best
    for output in (options.gguf, options.folder):
        if output:
            require_output(output)

    if options.gguf:
        student, tokenizer, history = checkpoint.load(best)
        gguf.write(options.gguf, student, tokenizer, checkpoint.temperature(history))
        print(f"written: {options.gguf}")
        print(f'llama.cpp: llama-completion -m {options.gguf} -no-cnv -p "Once upon a time,"')
    if not options.folder:
        return
    folders = write_folders(sources, options)
    print(f"written: {', '.join(map(str, folders.values()))}")
    print(f"upload: hf upload NAME/REPO {folders[MAIN]}")


def write_folders(sources: dict[str, Path], options: argparse.Namespace) -> dict[str, Path]:
    """Write a folder for each checkpoint: options.folder itself, or folders in it. Returns them by
    name."""
    folders = {MAIN: options.folder}
    if options.all_checkpoints:
        folders = {name: options.folder / name for name in sources}
    with atomic_folder(options.folder) as partial:
        for name, source in tqdm(sources.items(), desc="writing", unit=" folders", disable=None):
            student, tokenizer, history = checkpoint.load(source)
            folder = partial / folders[name].relative_to(options.folder)
            hf.write(folder, student, tokenizer, checkpoint.temperature(history))
            card = model_card(folders[name].name, source, student, history)
            atomic_write(folder / "README.md", card)
    is_for_babylm = options.all_checkpoints
    for corpus in history.get("corpus", []):
        is_for_babylm |= corpus.startswith("babylm")
    if is_for_babylm:
        warn_of_context(student)
    return folders


def warn_of_context(student: Student) -> None:
    context = student.config.context
    if context < hf.FINE_TUNING:
        print(
            f"warning: this student reads {context} tokens at most; BabyLM's fine-tuning uses "
            f"{hf.FINE_TUNING}: train with --context {hf.FINE_TUNING}, or fine-tune with a "
            "shorter --sequence_length",
            file=sys.stderr,
        )


def milestones(run: Path) -> list[Path]:
    """The chck_* folders of a run, earliest first. Raises UserError if there are none."""
    folders = [path for _, path in checkpoint.checkpoints(run) if path.name.startswith("chck_")]
    if not folders:
        raise UserError(
            f"{run} has no checkpoints/chck_*: --all-checkpoints takes the folder of a run that "
            "has some"
        )
    return folders[::-1]


if __name__ == "__main__":
    main()
