"""Tokenize a corpus before training and print its size.

    python scripts/prepare_data.py --corpus builtin
    python scripts/prepare_data.py --corpus tales.txt.gz more.jsonl --vocab-size 16000

train_pretrain.py does the same, or uses the result if its --corpus, --vocab-size, --val-fraction
and --seed are equal.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinystory.config import PretrainConfig, check
from tinystory.data.corpus import open_corpus
from tinystory.data.shards import prepare
from tinystory.run.errors import command
from tinystory.run.options import add_options, script_parser


@command
def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add_options(parser, PretrainConfig, ("corpus", "vocab_size", "val_fraction", "seed"))
    config = PretrainConfig(**vars(parser.parse_args(argv)))
    check(config)

    corpus = open_corpus(config.corpus)
    data = prepare(
        corpus, vocab_size=config.vocab_size, val_fraction=config.val_fraction, seed=config.seed
    )
    print(f"{'':12}{'documents':>12}{'words':>14}{'tokens':>14}{'words/token':>13}")
    for name, split in (("train", data.train), ("validation", data.val)):
        documents = len(split.offsets) - 1
        words = split.word_count
        tokens = len(split)
        print(f"{name:12}{documents:12,}{words:14,}{tokens:14,}{words / max(tokens, 1):13.3f}")
    print(f"vocabulary  {data.tokenizer.vocab_size:,} tokens")
    print(f"in          {data.path}")


if __name__ == "__main__":
    main()
