"""Export a checkpoint for transformers, or for llama.cpp, Ollama and LM Studio.

    python scripts/export_hf.py RUN exported                    a folder for transformers
    python scripts/export_hf.py RUN --gguf student.gguf         a GGUF file for llama.cpp

For a run, the checkpoint `best` is exported, or else the newest. The folder has a model card,
README.md, with its training data and licence. `hf upload NAME/REPO exported` uploads the folder to
the Hub, and `hf upload NAME/REPO exported --revision chck_1M` to a branch.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tinystory.report.card import model_card
from tinystory.run.errors import UserError, command
from tinystory.run.files import atomic_folder, atomic_write
from tinystory.run.folder import require_output
from tinystory.run.options import script_parser
from tinystory.run.text import printable
from tinystory.student import checkpoint, gguf, hf


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        help="folder of a checkpoint, or of a run (its checkpoint `best`, or else the newest)",
    )
    add("folder", type=Path, nargs="?", help="new folder to write")
    add("--gguf", type=Path, metavar="FILE", help="GGUF file to write")
    options = parser.parse_args(argv)
    outputs = [path for path in (options.gguf, options.folder) if path]
    if not outputs:
        raise UserError("there is nothing to write: give a new folder, or --gguf FILE")
    source = checkpoint.find(options.checkpoint)
    for output in outputs:
        require_output(output)

    student, tokenizer, history = checkpoint.load(source)
    if options.gguf:
        gguf.write(options.gguf, student, tokenizer)
        file = shlex.quote(str(options.gguf))
        print(f'llama.cpp: llama-completion -m {file} -no-cnv -p "Once upon a time,"')
    if options.folder:
        card = model_card(options.folder.name, student, history)
        with atomic_folder(options.folder) as partial:
            hf.write(partial, student, tokenizer)
            atomic_write(partial / "README.md", card)
    print(f"written: {', '.join(map(str, outputs))}")
    if options.folder:
        print(printable(f"upload: hf upload NAME/REPO {shlex.quote(str(options.folder))}"))


if __name__ == "__main__":
    main()
