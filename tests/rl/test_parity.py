"""Ours against TRL 0.9.4's PPOTrainer, quantity by quantity and, over four updates, weight by
weight.

What TRL computed is in trl_ppo.safetensors (make_trl_fixtures.py ran it). `pytest -s` prints the
largest absolute difference of each quantity.
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_ppo import policy, with_openings

from tinystory import ops
from tinystory.config import InteractConfig
from tinystory.config.presets import INTERACT_PRESETS
from tinystory.rl import policy as policies
from tinystory.rl import ppo
from tinystory.rl.policy import SharpAdam
from tinystory.student.model import Student, StudentConfig, ValueHead

FILE = Path(__file__).with_name("trl_ppo.safetensors")
with safe_open(FILE, "pt") as file:
    FACTS = json.loads(file.metadata()["facts"])
    KEPT = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open has no other way)
ON_THE_WAY = ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")


def tensors(prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): x for key, x in KEPT.items() if key.startswith(prefix)}


def load(weights: dict[str, torch.Tensor]) -> tuple[Student, ValueHead]:
    student, head = Student(StudentConfig(**FACTS["shape"])), ValueHead(FACTS["shape"]["n_embd"])
    names = {"value_head.weight": "linear.weight", "value_head.bias": "linear.bias"}
    head.load_state_dict({ours: weights[theirs] for theirs, ours in names.items()})
    student.load_state_dict({key: w for key, w in weights.items() if key not in names})
    return student, head


@pytest.mark.parametrize("setting", FACTS["settings"])
def test_four_updates_are_trls(setting, monkeypatch):
    options = FACTS["settings"][setting]
    options = INTERACT_PRESETS["paper"] | options
    monkeypatch.setattr(policies, "EPS", options.pop("adam_eps"))
    monkeypatch.setattr(ppo, "MAX_UPDATE_KL", math.inf)  # TRL undoes no step
    monkeypatch.setattr(ppo, "CLIP_VALUE", options.pop("clip_value"))
    # TRL has no micro-batches: they must not matter
    config = InteractConfig(**options, micro_batch_size=5)
    student, head = load(tensors("start/"))
    reference, _ = load(tensors("start/"))
    optimizer = SharpAdam(student, head, config)
    C, off, kl_coef = student.config.n_embd, {}, config.kl_coef

    def compare(name: str, got, want) -> None:
        got, want = (
            torch.as_tensor(got, dtype=torch.float32),
            torch.as_tensor(want, dtype=torch.float32),
        )
        off[name] = max(off.get(name, 0.0), float((got - want).abs().max()))

    for update in range(FACTS["updates"]):
        theirs, statistics = (
            tensors(f"{setting}/{update}/"),
            FACTS["statistics"][f"{setting}/{update}"],
        )
        mask, scores = theirs["mask"], theirs["scores"]
        openings = [torch.tensor(FACTS["opening"])] * len(mask)
        batch = with_openings(openings, theirs["tokens"].long(), mask.sum(1).tolist())
        with torch.no_grad():
            batch.logprobs, hidden = ppo.response_logprobs(student, batch)
            batch.values = head(hidden)
            entropy = float(
                ops.token_logprob(hidden, student.unembedding, batch.tokens)[1].sum()
            ) / len(mask)
        learner = policy(student, head, optimizer, config)
        batch = ppo.with_reference(learner, batch, reference)
        rewards = ppo.token_rewards(batch, scores, kl_coef)
        ours = ppo.gae_targets(config, head, dataclasses.replace(batch, rewards=rewards))
        for name in ON_THE_WAY:
            compare(name, batch.padded(getattr(ours, name)), theirs[name])

        orders = iter(theirs["orders"])
        monkeypatch.setattr(torch, "randperm", lambda n, orders=orders: next(orders))
        got = ppo.step(learner, batch, scores.tolist(), kl_coef)
        kl_coef = ppo.next_kl_coef(kl_coef, got["kl"], len(scores), config)
        got |= dict(tokens_mean=mask.sum(1).float().mean(), entropy=entropy, kl_coef_after=kl_coef)
        assert got["skipped"] == 0
        for name, want in statistics.items():
            compare(name, got[name], want)
        weights = dict(student.named_parameters())
        weights |= {
            f"value_head.{name.removeprefix('linear.')}": p for name, p in head.named_parameters()
        }
        for name, want in tensors(f"{setting}/{update}/weights/").items():
            got = weights[name].detach()
            if name.endswith("qkv.bias"):
                # The keys' bias adds the same to all attention logits of a row, which softmax
                # ignores: its gradient is only rounding error, which Adam scales up to a full step,
                # and no output depends on it.
                compare("keys' biases", got[C : 2 * C], want[C : 2 * C])
                got, want = (torch.cat([x[:C], x[2 * C :]]) for x in (got, want))
            compare(f"weights after {update + 1}", got, want)

    moved = max(
        float((w - KEPT[f"start/{n}"]).abs().max())
        for n, w in tensors(f"{setting}/3/weights/").items()
    )
    print(f"\n{setting}: weights moved by up to {moved:.1e}; largest absolute differences:")
    print("\n".join(f"  {name:24}{value:.1e}" for name, value in off.items()))
    assert off.pop("keys' biases") < 16 * config.learning_rate
    assert {name: value for name, value in off.items() if not value <= 1e-5} == {}
