"""Write a checkpoint for transformers, or for llama.cpp, Ollama and LM Studio.

    python scripts/export_hf.py runs/pretrain exported                   its best or newest checkpoint -> exported/
    python scripts/export_hf.py runs/pretrain --gguf student.gguf        ... and -> student.gguf
    python scripts/export_hf.py runs/pretrain exported --all-checkpoints exported/chck_1M, exported/chck_2M, ...

Each folder has a model card, README.md, written from the records of the run.

BabyLM's pipeline ignores --revision_name for a local folder: give it one folder per milestone, or upload each as a
branch of the Hugging Face Hub: `for f in exported/*; do hf upload NAME/REPO $f --revision $(basename $f); done`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from tinystory.report.card import model_card
from tinystory.run.errors import UserError, command
from tinystory.run.folder import atomic_write, require_writable
from tinystory.run.paths import usage
from tinystory.student import checkpoint, gguf, hf

MAIN = "main"  # folder of the best or newest checkpoint: the Hub's default revision


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=usage(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint, or of a run (its best or newest one)")
    parser.add_argument("folder", type=Path, nargs="?", help="new folder to write")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="file of GGUF to write")
    parser.add_argument("--all-checkpoints", action="store_true", help="write all chck_* of the run, one folder each")
    options = parser.parse_args(argv)
    if not (options.folder or options.gguf) or (options.all_checkpoints and not options.folder):
        raise UserError("there is nothing to write: give a new folder, or --gguf FILE alone")
    best = checkpoint.find(options.checkpoint)
    several = milestones(options.checkpoint) if options.all_checkpoints else []
    for path in filter(None, (options.gguf, options.folder)):
        require_writable(path)
    if options.gguf:
        student, tokenizer, _ = checkpoint.load(best)
        gguf.write(options.gguf, student, tokenizer)
        print(f"written: {options.gguf}")
    if not options.folder:
        return
    sources = {path.name: path for path in several} | {MAIN: best}
    folders = {name: options.folder / name if several else options.folder for name in sources}
    for name, folder in tqdm(folders.items(), desc="writing", unit=" folders", disable=None):
        student, tokenizer, history = checkpoint.load(sources[name])
        hf.write(folder, student, tokenizer)
        atomic_write(folder / "README.md", model_card(folder.name, sources[name], student, history))
    babylm = options.all_checkpoints or any(name.startswith("babylm") for name in history.get("corpus", []))
    if babylm and student.config.context < hf.FINE_TUNING:
        print(
            f"warning: this student reads {student.config.context} tokens at most; BabyLM's fine-tuning uses "
            f"{hf.FINE_TUNING}: train with --context {hf.FINE_TUNING}, or fine-tune with a shorter --sequence_length",
            file=sys.stderr,
        )
    print(f"written: {', '.join(map(str, folders.values()))}")


def milestones(run: Path) -> list[Path]:
    """The chck_* folders of a run, the earliest first. Raises UserError if there are none."""
    folders = [folder for _, folder in checkpoint.checkpoints(run) if folder.name.startswith("chck_")]
    if not folders:
        raise UserError(f"{run} has no checkpoints/chck_*: --all-checkpoints takes the folder of a run that has some")
    return folders[::-1]


if __name__ == "__main__":
    main()
