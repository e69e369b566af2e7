"""Write a checkpoint for transformers, or for llama.cpp, Ollama and LM Studio, or upload a run's
    milestones to the Hub.

    python scripts/export_hf.py runs/pretrain exported                   its best or newest
    checkpoint -> exported/ python scripts/export_hf.py runs/pretrain --gguf student.gguf        ...
    and -> student.gguf
    python scripts/export_hf.py runs/pretrain exported --all-checkpoints exported/chck_1M,
    exported/chck_2M, ...
    python scripts/export_hf.py runs/pretrain exported --all-checkpoints --push NAME/REPO

Each folder has a model card, README.md, written from the records of the run. --push uploads each
milestone as a branch of that name, and the best or newest checkpoint as `main`; it needs `pip
install huggingface_hub` and a token, from
`hf auth login` or HF_TOKEN. For a local folder BabyLM's pipeline ignores --revision_name: give it
one per milestone.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from tinystory.report.card import model_card
from tinystory.run import hub
from tinystory.run.errors import UserError, command
from tinystory.run.folder import atomic_folder, atomic_write, require_output
from tinystory.run.options import script_parser
from tinystory.student import checkpoint, gguf, hf

MAIN = "main"  # branch of the best or newest checkpoint, the Hub's default branch


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument(
        "checkpoint", type=Path, help="folder of a checkpoint, or of a run (its best or newest one)"
    )
    parser.add_argument("folder", type=Path, nargs="?", help="new folder to write")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="file of GGUF to write")
    parser.add_argument(
        "--all-checkpoints",
        action="store_true",
        help="write all chck_* of the run, one folder each",
    )
    parser.add_argument(
        "--push", metavar="REPO", default="", help="then upload to this repository on the Hub"
    )
    options = parser.parse_args(argv)
    if not (options.folder or options.gguf) or (
        (options.push or options.all_checkpoints) and not options.folder
    ):
        raise UserError("there is nothing to write: give a new folder, or --gguf FILE alone")
    best = checkpoint.find(options.checkpoint)
    several = milestones(options.checkpoint) if options.all_checkpoints else []
    for path in filter(None, (options.gguf, options.folder)):
        require_output(path)
    api, address = open_hub(options.push) if options.push else (None, "")
    if options.gguf:
        student, tokenizer, _ = checkpoint.load(best)
        gguf.write(options.gguf, student, tokenizer)
        print(f"written: {options.gguf}")
    if not options.folder:
        return
    sources = {path.name: path for path in several} | {MAIN: best}
    folders = {name: options.folder / name if several else options.folder for name in sources}
    with atomic_folder(options.folder) as partial:
        for branch in tqdm(sources, desc="writing", unit=" folders", disable=None):
            student, tokenizer, history = checkpoint.load(sources[branch])
            folder = partial / branch if several else partial
            hf.write(folder, student, tokenizer)
            name = options.push or folders[branch].name
            revision = branch if options.push and branch != MAIN else ""
            card = model_card(name, sources[branch], student, history, revision)
            atomic_write(folder / "README.md", card)
    babylm = options.all_checkpoints or any(
        name.startswith("babylm") for name in history.get("corpus", [])
    )
    if babylm and student.config.context < hf.FINE_TUNING:
        print(
            f"warning: this student reads {student.config.context} tokens at most; BabyLM's fine-tuning uses "
            f"{hf.FINE_TUNING}: train with --context {hf.FINE_TUNING}, or fine-tune with a shorter --sequence_length",
            file=sys.stderr,
        )
    print(f"written: {', '.join(map(str, folders.values()))}")
    if api:
        push(api, options.push, folders)
        print(f"pushed: {address}")


def milestones(run: Path) -> list[Path]:
    """The chck_* folders of a run, earliest first. Raises UserError if there are none."""
    folders = [
        folder for _, folder in checkpoint.checkpoints(run) if folder.name.startswith("chck_")
    ]
    if not folders:
        raise UserError(
            f"{run} has no checkpoints/chck_*: --all-checkpoints takes the folder of a run that has some"
        )
    return folders[::-1]


def open_hub(repository: str) -> tuple[Any, str]:
    """The Hub's client, and the URL of the repository, which is created if missing."""
    with hub.reached(f"push to {repository}"):
        from huggingface_hub import HfApi

        return (api := HfApi()), str(api.create_repo(repository, exist_ok=True))


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
