"""Write a checkpoint for transformers, or for llama.cpp, Ollama and LM Studio, or upload a run's
milestones to the Hub.

    python scripts/export_hf.py RUN exported                    its best or newest checkpoint
    python scripts/export_hf.py RUN --gguf student.gguf         ... as a file of GGUF
    python scripts/export_hf.py RUN exported --all-checkpoints  exported/chck_1M, exported/chck_2M, ...
    python scripts/export_hf.py RUN exported --all-checkpoints --push NAME/REPO

Each folder has a model card, README.md, written from the records of the run. --push uploads each
milestone as a branch of that name, and the best or newest checkpoint as `main`; it needs
`pip install huggingface_hub` and a token, from `hf auth login` or HF_TOKEN. For a local folder
BabyLM's pipeline ignores --revision_name: give it one per milestone.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from tinystory.report.card import model_card
from tinystory.run import hub
from tinystory.run.errors import UserError, command
from tinystory.run.files import atomic_folder, atomic_write
from tinystory.run.folder import require_output
from tinystory.run.options import script_parser
from tinystory.student import checkpoint, gguf, hf
from tinystory.student.model import Student

MAIN = "main"  # branch of the best or newest checkpoint, the Hub's default branch


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
    add("--push", metavar="REPO", default="", help="then upload to this repository on the Hub")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    needs_folder = options.push or options.all_checkpoints or not options.gguf
    if needs_folder and not options.folder:
        raise UserError("there is nothing to write: give a new folder, or --gguf FILE alone")
    best = checkpoint.find(options.checkpoint)
    sources: dict[str, Path] = {}  # by branch
    if options.all_checkpoints:
        for path in milestones(options.checkpoint):
            sources[path.name] = path
    sources[MAIN] = best
    for output in (options.gguf, options.folder):
        if output:
            require_output(output)
    hub_client = open_hub(options.push) if options.push else None

    if options.gguf:
        student, tokenizer, _ = checkpoint.load(best)
        gguf.write(options.gguf, student, tokenizer)
        print(f"written: {options.gguf}")
    if not options.folder:
        return
    folders = write_folders(sources, options)
    print(f"written: {', '.join(map(str, folders.values()))}")
    if hub_client:
        api, address = hub_client
        push(api, options.push, folders)
        print(f"pushed: {address}")


def write_folders(sources: dict[str, Path], options: argparse.Namespace) -> dict[str, Path]:
    """Write a folder for each branch's checkpoint: options.folder itself, or folders in it. Returns
    them by branch."""
    folders = {MAIN: options.folder}
    if options.all_checkpoints:
        folders = {branch: options.folder / branch for branch in sources}
    with atomic_folder(options.folder) as partial:
        for branch, source in tqdm(sources.items(), desc="writing", unit=" folders", disable=None):
            student, tokenizer, history = checkpoint.load(source)
            folder = partial / folders[branch].relative_to(options.folder)
            hf.write(folder, student, tokenizer)
            name = options.push or folders[branch].name
            revision = branch if options.push and branch != MAIN else ""
            card = model_card(name, source, student, history, revision)
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


def open_hub(repository: str) -> tuple[Any, str]:
    """The Hub's client, and the URL of the repository, which is created if missing."""
    with hub.reached(f"push to {repository}"):
        from huggingface_hub import HfApi

        api = HfApi()
        return api, str(api.create_repo(repository, exist_ok=True))


def push(api: Any, repository: str, folders: dict[str, Path]) -> None:
    """Upload each folder to the branch of its name, replacing the content."""
    with hub.reached(f"push to {repository}, for which the written folders are kept"):
        for branch, folder in tqdm(folders.items(), desc="pushing", unit=" branches", disable=None):
            if branch != MAIN:
                api.create_branch(repository, branch=branch, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                revision=branch,
                delete_patterns="*",
                commit_message=f"{branch} of a tinystory student",
            )


if __name__ == "__main__":
    main()
