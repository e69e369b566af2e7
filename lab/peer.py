"""Times another program ("peer") for `lab/bench.py peers`. It runs in a Python environment that has
the peer's packages. For each line of input, it prints the seconds of one run.

python lab/peer.py trl '{"model": {"n_layer": 4, ...}, "batch": 64, "prompt": 20, "new": 90, ...}'

Written for trl 0.9.4 and transformers 4.53.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch


def nanogpt(a: SimpleNamespace) -> Callable:
    """A training step of nanoGPT's compiled model with fused AdamW, as in nanoGPT's train.py."""
    sys.path.insert(0, a.repo)
    from model import GPT, GPTConfig  # nanoGPT's model.py

    sizes = dict(a.model)
    context = sizes.pop("context")
    model = GPT(GPTConfig(block_size=context, dropout=0.0, bias=True, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model)
    inputs = torch.randint(0, sizes["vocab_size"], (a.batch, context))
    targets = torch.randint(0, sizes["vocab_size"], (a.batch, context))

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=a.dtype == "bfloat16"):
            _, loss = forward(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def gpt2(model: dict) -> Any:  # a transformers model
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(model)
    context = sizes.pop("context")
    config = GPT2Config(bos_token_id=1, eos_token_id=2, n_positions=context, **sizes)
    return GPT2LMHeadModel(config)


def transformers(a: SimpleNamespace) -> Callable:
    """generate() with pure sampling and without early ends, so that the amount of work is fixed."""
    model = gpt2(a.model).eval().to(getattr(torch, a.dtype))
    ids = torch.randint(5, a.model["vocab_size"], (1, a.prompt)).repeat(a.batch, 1)

    @torch.no_grad()
    def run() -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=a.new,
            min_new_tokens=a.new,
            pad_token_id=0,
        )

    return run


def trl(a: SimpleNamespace) -> Callable:
    """A PPO iteration of TRL 0.9.4, which the paper's code uses: generation, log-probabilities
    under student and reference, four epochs over one batch. The reward is constant, so that only
    the student's work is timed."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    size = a.model["vocab_size"]
    words = models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words),
        pad_token="t0",
        bos_token="t1",
        eos_token="t2",
        unk_token="t0",
    )
    with tempfile.TemporaryDirectory() as folder:
        gpt2(a.model).save_pretrained(folder)
        policy = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
        reference = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    config = PPOConfig(batch_size=a.batch, mini_batch_size=a.batch, learning_rate=1e-6)
    trainer = PPOTrainer(config, policy, reference, tokenizer)
    queries = [torch.randint(5, size, (a.prompt,)) for _ in range(a.batch)]
    rewards = [torch.tensor(0.5)] * a.batch

    def run() -> None:
        with torch.no_grad():
            texts = trainer.generate(
                queries,
                batch_size=a.batch,
                max_new_tokens=a.new,
                min_length=-1,
                top_k=0,
                top_p=1.0,
                do_sample=True,
                pad_token_id=0,
                eos_token_id=-1,
            )
        responses = [text[a.prompt :] for text in texts]
        trainer.step(queries, responses, rewards)

    return run


PEERS = {"nanogpt": nanogpt, "transformers": transformers, "trl": trl}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument(
        "settings", type=json.loads, help="JSON object with the settings of lab/bench.py"
    )
    options = parser.parse_args()
    a = SimpleNamespace(**options.settings)
    output = os.fdopen(os.dup(1), "w")  # libraries print to standard output too
    os.dup2(2, 1)
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    run = PEERS[options.peer](a)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, file=output, flush=True)


if __name__ == "__main__":
    main()
