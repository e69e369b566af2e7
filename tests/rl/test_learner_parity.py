"""RLOO, GRPO, Dr. GRPO, DPO and fine-tuning on the best stories against TRL 1.16.0, weight by weight.

What TRL computed is in trl_learners.safetensors (make_trl_learner_fixtures.py ran it). `pytest -s`
prints the largest absolute difference of each quantity.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_ppo import policy, with_openings

from tinystory.config import InteractConfig
from tinystory.config.presets import INTERACT_PRESETS
from tinystory.rl import policy as policies
from tinystory.rl import ppo
from tinystory.rl.policy import SharpAdam
from tinystory.student.model import Student, StudentConfig

with safe_open(Path(__file__).with_name("trl_learners.safetensors"), "pt") as file:
    FACTS = json.loads(file.metadata()["facts"])
    TENSORS = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (safe_open has no other way)


def tensors(prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): x for key, x in TENSORS.items() if key.startswith(prefix)}


def start() -> Student:
    student = Student(StudentConfig(**FACTS["shape"]))
    student.load_state_dict(tensors("start/"))
    return student


@pytest.mark.parametrize("setting", FACTS["settings"])
def test_four_updates_of_each_learner_are_trls(setting, monkeypatch):
    monkeypatch.setattr(ppo, "MAX_RATIO", 1e9)
    monkeypatch.setattr(ppo, "MAX_UPDATE_KL", math.inf)  # TRL undoes no step
    options = dict(lr_decay=False, max_new_tokens=FACTS["longest"], stories_per_step=12)
    options = INTERACT_PRESETS["paper"] | options | FACTS["settings"][setting]
    monkeypatch.setattr(policies, "EPS", options.pop("adam_eps"))
    config = InteractConfig(**options)
    # TRL has no micro-batches, so they must not matter. Pairs need micro-batches of even size.
    config.micro_batch_size = 4 if config.learner == "dpo" else 5
    student, reference, differences = start(), start(), {}
    optimizer = SharpAdam(student, torch.nn.Module(), config)

    def compare(name: str, got, want) -> None:
        differences[name] = max(
            differences.get(name, 0.0), float((torch.as_tensor(got) - want).abs().max())
        )

    def recorded(policy, batch, *more):
        used["advantages"] = batch.advantages
        return update(policy, batch, *more)

    update, used = ppo.update, {}
    monkeypatch.setattr(ppo, "update", recorded)
    for number in range(FACTS["batches"]):
        theirs = tensors(f"{setting}/{number}/")
        openings = [
            torch.tensor(opening)
            for opening in FACTS["openings"]
            for _ in range(config.stories_per_opening)
        ]
        batch = with_openings(openings, theirs["tokens"], theirs["lengths"].tolist())
        with torch.no_grad():
            batch.logprobs = ppo.response_logprobs(student, batch)[0]
        parts = policy(student, torch.nn.Module(), optimizer, config)
        batch = ppo.with_reference(parts, batch, reference)
        stats = ppo.step(parts, batch, theirs["scores"].tolist(), config.kl_coef)
        compare("loss", stats["policy_loss"], theirs["losses"].mean())
        compare("gradient norm", stats["grad_norm"], theirs["grad_norms"].mean())
        if "advantages" in theirs:
            compare(
                "advantages",
                used["advantages"],
                batch.unpadded(theirs["advantages"][:, None]),
            )
    C = student.config.n_embd
    for name, want in tensors(f"{setting}/weights/").items():
        got = dict(student.named_parameters())[name].detach()
        # the keys' bias has no effect, and its gradient is rounding error (test_parity.py)
        if name.endswith("qkv.bias"):
            got, want = (torch.cat([x[:C], x[2 * C :]]) for x in (got, want))
        compare("weights", got, want)
        compare("moved", got, tensors("start/")[name] if not name.endswith("qkv.bias") else got)
    print(f"\n{setting}:", ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))
    assert differences.pop("moved") > 1e-3
    assert {name: value for name, value in differences.items() if not value <= 1e-5} == {}
