"""Write trl_ppo.safetensors, the results of TRL 0.9.4's PPOTrainer, with which
tests/rl/test_parity.py compares ours.

Use a separate venv, because later versions of TRL have no such PPOTrainer:

    pip install torch transformers==4.53.0 trl==0.9.4 rich 'numpy<2.3'
    python tests/rl/make_trl_fixtures.py

A two-layer GPT-2, float32, writes and learns for four updates under each of three settings. Kept of
each update: the stories and scores, every tensor on the way to the loss, every statistic, and all
weights afterwards (under the second and third setting those after the last). Tensors are named
SETTING/UPDATE/QUANTITY; weights have our names and our layout (nn.Linear's, the transpose of
GPT-2's Conv1D).
"""

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_gpt2 import EOS, PAD, SHAPE, our_weights, random_gpt2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import masked_mean, masked_var

OPENING = [7, 30, 11, 5]
STORIES, LONGEST, UPDATES = 12, 10, 4

# Our options, named as in InteractConfig. The learning rates exceed the paper's 1e-6, so that a
# difference shows.
PAPER = dict(learning_rate=1e-4, adam_eps=1e-8, epochs=4, minibatch_size=0, gamma=1.0, lam=0.95)
PAPER |= dict(clip_ratio=0.2, clip_value=0.2, value_coef=0.1)
PAPER |= dict(kl_coef=0.2, kl_target=6.0, kl_horizon=10_000.0)
CLIPPED = dict(learning_rate=2e-3, adam_eps=1e-5, lam=1.0, clip_ratio=0.05, clip_value=0.05)
CLIPPED |= dict(value_coef=1.0, kl_coef=0.5, kl_target=0.05, kl_horizon=100.0)
SETTINGS = {
    "paper": PAPER,
    "minibatches": PAPER | dict(epochs=2, minibatch_size=4, gamma=0.97, lam=0.9),
    "clipped": PAPER | CLIPPED,
}


def policy_weights(policy) -> dict[str, torch.Tensor]:
    head = {
        f"value_head.{name}": p.detach().clone()
        for name, p in policy.v_head.summary.named_parameters()
    }
    return our_weights(policy.pretrained_model) | head


class Recorded:
    """A PPOTrainer that keeps the tensors of each step in `seen`."""

    def __init__(self, policy, reference, tokenizer, setting):
        config = PPOConfig(
            batch_size=STORIES,
            mini_batch_size=setting["minibatch_size"] or STORIES,
            ppo_epochs=setting["epochs"],
            gamma=setting["gamma"],
            lam=setting["lam"],
            cliprange=setting["clip_ratio"],
            cliprange_value=setting["clip_value"],
            vf_coef=setting["value_coef"],
            init_kl_coef=setting["kl_coef"],
            target=setting["kl_target"],
            horizon=setting["kl_horizon"],
        )
        rate, eps = setting["learning_rate"], setting["adam_eps"]
        optimizer = torch.optim.Adam(policy.parameters(), lr=rate, eps=eps)
        self.trainer = trainer = PPOTrainer(
            config, policy, reference, tokenizer, optimizer=optimizer
        )
        self.seen, self.each = {}, {}
        rewards, advantages, loss, step = (
            trainer.compute_rewards,
            trainer.compute_advantages,
            trainer.loss,
            trainer.optimizer.step,
        )

        def compute_rewards(scores, logprobs, ref_logprobs, masks):
            out = rewards(scores, logprobs, ref_logprobs, masks)
            self.mask = masks
            self.seen |= dict(logprobs=logprobs, ref_logprobs=ref_logprobs, rewards=out[0])
            return out

        def compute_advantages(values, reward, mask):
            out = advantages(values, reward, mask)
            self.seen |= dict(values=out[0], advantages=out[1], returns=out[2])
            return out

        def recorded_loss(
            old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns
        ):
            out = loss(old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns)
            ratio = (logprobs - old_logprobs).exp()
            k3 = masked_mean(ratio - 1 - ratio.log(), mask)
            for name, value in (("k3", k3), ("entropy_first", out[2]["policy/entropy"])):
                self.each.setdefault(name, []).append(float(value))
            return out

        def optimizer_step(*args, **kwargs):
            norm = torch.stack(
                [p.grad.norm() for p in policy.parameters() if p.grad is not None]
            ).norm()
            self.each.setdefault("grad_norm", []).append(float(norm))
            return step(*args, **kwargs)

        trainer.compute_rewards, trainer.compute_advantages, trainer.loss = (
            compute_rewards,
            compute_advantages,
            recorded_loss,
        )
        trainer.optimizer.step = optimizer_step

    def step(self, stories, scores) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """One PPO step; (B, LONGEST) tensors, 0 off the mask, and TRL's statistics under our
        names."""
        self.seen, self.each, orders = {}, {}, []
        permutation = np.random.permutation
        np.random.permutation = lambda n: orders.append(permutation(n)) or orders[-1]
        queries = [torch.tensor(OPENING)] * STORIES
        stats = self.trainer.step(queries, stories, list(scores))
        np.random.permutation = permutation

        first, mask = len(OPENING) - 1, self.mask.bool()
        tensors = {name: (x * mask)[:, first:] for name, x in self.seen.items()} | {
            "mask": mask[:, first:]
        }
        tensors = {
            name: torch.nn.functional.pad(x, (0, LONGEST - x.shape[1])).contiguous()
            for name, x in tensors.items()
        }
        values, returns, on = tensors["values"], tensors["returns"], tensors["mask"]
        statistics = dict(
            kl=float(stats["objective/kl"]),
            kl_coef=float(stats["objective/kl_coef"]),
            kl_coef_after=float(self.trainer.kl_ctl.value),
            policy_loss=float(stats["ppo/loss/policy"]),
            value_loss=float(stats["ppo/loss/value"]),
            clip_fraction=float(stats["ppo/policy/clipfrac"]),
            approx_kl=float(np.mean(self.each["k3"])),
            grad_norm=float(np.mean(self.each["grad_norm"])),
            reward_mean=float(stats["ppo/mean_scores"]),
            reward_std=float(stats["ppo/std_scores"]),
            explained_variance=float(
                1 - masked_var(returns - values, on) / masked_var(returns, on)
            ),
            tokens_mean=float(stats["tokens/responses_len_mean"]),
        )
        # the first pass uses the old weights for all stories
        if self.trainer.config.mini_batch_size == STORIES:
            statistics["entropy"] = self.each["entropy_first"][0] * float(on.sum()) / STORIES
        return tensors | {"orders": torch.tensor(np.stack(orders))}, statistics


def write_stories(trainer: PPOTrainer, update: int) -> list[torch.Tensor]:
    """Sampled by TRL; three are cut short, so that lengths differ and some end with the end
    token."""
    torch.manual_seed(update)
    sampling = dict(
        max_new_tokens=LONGEST, min_length=-1, top_k=0, top_p=1.0, do_sample=True, pad_token_id=PAD
    )
    with torch.no_grad():
        stories = trainer.generate(
            [torch.tensor(OPENING)] * STORIES, return_prompt=False, **sampling
        )
    stories[0], stories[1] = stories[0][:1], torch.tensor([EOS])
    stories[2] = torch.cat([stories[2][:5], torch.tensor([EOS])])
    return stories


def main() -> None:
    warnings.filterwarnings("ignore")
    words = Tokenizer(
        models.WordLevel({f"t{i}": i for i in range(SHAPE["vocab_size"])}, unk_token="t0")
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t0", pad_token="t1", eos_token="t2"
    )
    # TRL passes no position ids, so left-padded rows would have wrong positions
    tokenizer.padding_side = "right"
    fixtures, statistics = {}, {}
    for name, setting in SETTINGS.items():
        # its head has TRL's dropout of 0.1
        policy = AutoModelForCausalLMWithValueHead.from_pretrained(random_gpt2())
        reference = copy.deepcopy(policy)
        fixtures |= {f"start/{key}": w for key, w in policy_weights(policy).items()}
        recorded = Recorded(policy, reference, tokenizer, setting)
        for update in range(UPDATES):
            stories = write_stories(recorded.trainer, update)
            scores = torch.rand(STORIES, generator=torch.Generator().manual_seed(100 + update))
            tensors, statistics[f"{name}/{update}"] = recorded.step(stories, scores)
            tokens = torch.nn.utils.rnn.pad_sequence([*stories, torch.zeros(LONGEST).long()], True)[
                :-1
            ]
            tensors |= {"tokens": tokens.to(torch.int16), "scores": scores}
            if name == "paper" or update == UPDATES - 1:  # to keep the file small
                tensors |= {f"weights/{key}": w for key, w in policy_weights(policy).items()}
            fixtures |= {f"{name}/{update}/{key}": x.contiguous() for key, x in tensors.items()}
    facts = dict(
        shape=SHAPE, opening=OPENING, settings=SETTINGS, updates=UPDATES, statistics=statistics
    )
    file = Path(__file__).with_name("trl_ppo.safetensors")
    save_file(fixtures, file, metadata={"facts": json.dumps(facts)})
    print(f"{file}: {file.stat().st_size:,} bytes")
    print(json.dumps(statistics, indent=1))


if __name__ == "__main__":
    main()
