"""One peer of `bench.py peers`, run by a Python that has it and not us: prints the seconds of a run after a warm-up,
and again for each line that it reads.

    python scripts/peer.py nanogpt --model '{"n_layer": 4, ...}' --batch 16 --mode compile-bfloat16 --repo nanoGPT
    python scripts/peer.py transformers --model '{...}' --batch 64 --new 90 --mode bfloat16
    python scripts/peer.py trl --model '{...}' --batch 64 --new 90  # trl 0.9.4, transformers 4.53
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

EOS = 2


def nanogpt(a: argparse.Namespace) -> Callable:
    """A training step of nanoGPT's own model: forward and backward pass, fused AdamW, as its train.py has them."""
    sys.path.insert(0, a.repo)
    from model import GPT, GPTConfig  # nanoGPT's

    layout = dict(n_layer=a.model["n_layer"], n_head=a.model["n_head"], n_embd=a.model["n_embd"])
    model = GPT(
        GPTConfig(block_size=a.model["context"], vocab_size=a.model["vocab_size"], dropout=0.0, bias=True, **layout)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    kind, dtype = a.mode.split("-")
    forward = torch.compile(model) if kind == "compile" else model
    tokens = torch.randint(0, a.model["vocab_size"], (2, a.batch, a.model["context"]))

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            _, loss = forward(tokens[0], tokens[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def gpt2(model: dict) -> Any:  # a transformers model
    from transformers import GPT2Config, GPT2LMHeadModel

    layout = dict(n_layer=model["n_layer"], n_head=model["n_head"], n_embd=model["n_embd"])
    sizes = dict(vocab_size=model["vocab_size"], n_positions=model["context"])
    return GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=EOS, **sizes, **layout))


def transformers(a: argparse.Namespace) -> Callable:
    """generate() by pure sampling. No story ends early, so the work is fixed."""
    model = gpt2(a.model).eval().to(getattr(torch, a.mode))
    ids = torch.randint(5, a.model["vocab_size"], (1, a.prompt)).repeat(a.batch, 1)
    how = dict(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=a.new, min_new_tokens=a.new, pad_token_id=0)

    def run() -> None:
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), **how)

    return run


def trl(a: argparse.Namespace) -> Callable:
    """A PPO iteration of TRL 0.9.4, on which the paper's code builds: generate, log-probabilities under the student and
    the reference, four epochs over one batch. The reward is a constant, so only the student's work is timed."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(a.model["vocab_size"])}, unk_token="t0"))
    special = dict(pad_token="t0", bos_token="t1", eos_token="t2", unk_token="t0")
    with tempfile.TemporaryDirectory() as folder:
        gpt2(a.model).save_pretrained(folder)
        policy, reference = (AutoModelForCausalLMWithValueHead.from_pretrained(folder) for _ in range(2))
    options = PPOConfig(batch_size=a.batch, mini_batch_size=a.batch, learning_rate=1e-6)
    trainer = PPOTrainer(options, policy, reference, PreTrainedTokenizerFast(tokenizer_object=words, **special))
    queries = [torch.randint(5, a.model["vocab_size"], (a.prompt,)) for _ in range(a.batch)]
    how = dict(max_new_tokens=a.new, min_length=-1, top_k=0, top_p=1.0, do_sample=True, pad_token_id=0, eos_token_id=-1)

    def run() -> None:
        with torch.no_grad():
            full = trainer.generate(queries, batch_size=a.batch, **how)
        trainer.step(queries, [row[a.prompt :] for row in full], [torch.tensor(0.5)] * a.batch)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", type=json.loads, required=True, help="n_layer, n_head, n_embd, context, vocab_size")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=20)
    parser.add_argument("--new", type=int, default=90)
    parser.add_argument("--mode", default="")
    parser.add_argument("--repo", help="a clone of nanoGPT")
    parser.add_argument("--threads", type=int, required=True)
    a = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # libraries print what they like to standard output
    os.dup2(2, 1)
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    run = PEERS[a.peer](a)
    run()
    while True:
        began = time.perf_counter()
        run()
        print(time.perf_counter() - began, file=answers, flush=True)
        if not sys.stdin.readline():
            return


PEERS = {"nanogpt": nanogpt, "transformers": transformers, "trl": trl}

if __name__ == "__main__":
    main()
