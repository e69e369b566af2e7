"""Tokenize a corpus before training and print its size.

    python scripts/prepare_data.py --corpus builtin
    python scripts/prepare_data.py --corpus tales.txt.gz more.jsonl --vocab-size 16000

train_pretrain.py does the same at its start, or uses the result of this script if --corpus, --vocab-size,
--val-fraction and --seed are the same.
"""

import argparse

from tinystory.config import PretrainConfig, check
from tinystory.data.corpus import NAMES, open_corpus
from tinystory.data.shards import prepare
from tinystory.run.errors import command
from tinystory.run.paths import usage


@command
def main(argv: list[str] | None = None) -> None:
    default = PretrainConfig()
    parser = argparse.ArgumentParser(description=usage(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--corpus",
        nargs="+",
        default=default.corpus,
        metavar="NAME|FILE",
        help=f"corpora ({', '.join(NAMES)}) and .txt, .jsonl, .txt.gz or .jsonl.gz files, concatenated "
        f" (default: {' '.join(default.corpus)})",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=default.vocab_size,
        metavar="N",
        help="tokens to learn, including five special ones (default: %(default)s)",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=default.val_fraction,
        metavar="F",
        help="fraction of the documents held out for validation (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=default.seed,
        metavar="N",
        help="chooses the held-out documents (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    check(PretrainConfig(**vars(args)))

    data = prepare(open_corpus(args.corpus), vocab_size=args.vocab_size, val_fraction=args.val_fraction, seed=args.seed)
    print(f"{'':12}{'documents':>12}{'words':>14}{'tokens':>14}{'bytes':>14}{'words/token':>13}")
    for name, split in (("train", data.train), ("validation", data.val)):
        documents, tokens = len(split.offsets) - 1, len(split)
        print(
            f"{name:12}{documents:12,}{split.word_count:14,}{tokens:14,}{split.byte_count:14,}"
            f"{split.word_count / max(tokens, 1):13.3f}"
        )
    print(f"vocabulary  {data.tokenizer.vocab_size:,} tokens")
    print(f"in          {data.path}")


if __name__ == "__main__":
    main()
