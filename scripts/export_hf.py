"""Write a checkpoint for transformers, or for llama.cpp, Ollama and LM Studio, or upload a run's milestones to the Hub.

    python scripts/export_hf.py runs/pretrain exported                   its best or newest checkpoint -> exported/
    python scripts/export_hf.py runs/pretrain --gguf student.gguf        ... and -> student.gguf
    python scripts/export_hf.py runs/pretrain exported --all-checkpoints exported/chck_1M, exported/chck_2M, ...
    python scripts/export_hf.py runs/pretrain exported --all-checkpoints --push NAME/REPO

Each folder has a model card, README.md, written from the records of the run.

BabyLM's pipeline ignores --revision_name for a local folder: give it one folder per milestone, or push, which uploads
each milestone as a branch of that name and the best or newest checkpoint as `main`. Pushing needs
`pip install huggingface_hub` and a token: `hf auth login`, or HF_TOKEN.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from tinystory.report.card import model_card
from tinystory.run.errors import UserError, command
from tinystory.run.folder import atomic_write
from tinystory.run.paths import usage
from tinystory.student import checkpoint, gguf, hf

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"  # branch of the best or newest checkpoint: the Hub's default revision


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=usage(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint, or of a run (its best or newest one)")
    parser.add_argument("folder", type=Path, nargs="?", help="new folder to write")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="file of GGUF to write")
    parser.add_argument("--all-checkpoints", action="store_true", help="write all chck_* of the run, one folder each")
    parser.add_argument("--push", metavar="REPO", default="", help="then upload to this repository on the Hub")
    options = parser.parse_args(argv)
    if not (options.folder or options.gguf) or ((options.push or options.all_checkpoints) and not options.folder):
        raise UserError("there is nothing to write: give a new folder, or --gguf FILE alone")
    api = open_hub() if options.push else None

    best = checkpoint.find(options.checkpoint)
    if options.gguf:
        student, tokenizer, _ = checkpoint.load(best)
        gguf.write(options.gguf, student, tokenizer)
        print(f"written: {options.gguf}")
    if not options.folder:
        return
    several = milestones(options.checkpoint) if options.all_checkpoints else []
    sources = {path.name: path for path in several} | {MAIN: best}
    folders = {name: options.folder / name if several else options.folder for name in sources}
    for branch, folder in tqdm(folders.items(), desc="writing", unit=" folders", disable=None):
        student, tokenizer, history = checkpoint.load(sources[branch])
        hf.write(folder, student, tokenizer)
        revision = branch if options.push and branch != MAIN else ""
        card = model_card(options.push or folder.name, sources[branch], student, history, revision)
        atomic_write(folder / "README.md", card)
    if student.config.context < hf.FINE_TUNING:
        print(
            f"warning: this student reads {student.config.context} tokens at most; BabyLM's fine-tuning uses "
            f"{hf.FINE_TUNING}: train with --context {hf.FINE_TUNING}, or fine-tune with a shorter --sequence_length",
            file=sys.stderr,
        )
    print(f"written: {', '.join(map(str, folders.values()))}")
    if api:
        print(f"pushed: {push(api, options.push, folders)}")


def milestones(run: Path) -> list[Path]:
    """The chck_* folders of a run, the earliest first. Raises UserError if there are none."""
    folders = [folder for _, folder in checkpoint.checkpoints(run) if folder.name.startswith("chck_")]
    if not folders:
        raise UserError(f"{run} has no checkpoints/chck_*: --all-checkpoints takes the folder of a run that has some")
    return folders[::-1]


def open_hub() -> "HfApi":
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError("--push needs the Hub's client: pip install huggingface_hub") from error
    return HfApi()


def push(api: "HfApi", repository: str, folders: dict[str, Path]) -> str:
    """Upload each folder to the branch of its name, replacing the content. Returns the URL of the repository."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        address = api.create_repo(repository, exist_ok=True)
        for branch, folder in tqdm(folders.items(), desc="pushing", unit=" branches", disable=None):
            if branch != MAIN:
                api.create_branch(repository, branch=branch, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=folder, revision=branch, delete_patterns="*",
                commit_message=f"{branch} of a tinystory student",
            )  # fmt: skip
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"cannot push to {repository}: {' '.join(str(error).split())[:300]}; the written folders are kept: fix the "
            "cause and push again"
        ) from error
    return str(address)


if __name__ == "__main__":
    main()
