"""Write trl_learners.safetensors: what TRL 1.16.0's RLOOTrainer, GRPOTrainer, DPOTrainer and
SFTTrainer compute, for tests/rl/test_learner_parity.py to compare with.

Use a separate venv, because make_trl_fixtures.py needs another TRL:

    pip install torch trl==1.16.0
    python tests/rl/make_trl_learner_fixtures.py

A two-layer GPT-2, float32, learns from two batches of three openings, four stories each, two
updates per batch. Kept
of each batch: stories, scores, the advantages, and of each update the loss; at the end, all
weights. Tensors are named SETTING/BATCH/QUANTITY; weights have our names and our layout.
"""

import copy
import json
import tempfile
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from tiny_gpt2 import EOS, PAD, SHAPE, our_weights, random_gpt2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.utils import add_fused_lm_head

OPENINGS = [[7, 30, 11, 5], [9, 8, 3, 21], [4, 12, 12, 6]]
GROUP, LONGEST, BATCHES, EPOCHS = 4, 10, 2, 2

# Our options, named as in InteractConfig. The learning rate exceeds the default, so that clipping
# sets in.
ALL = dict(
    learning_rate=3e-3, adam_eps=1e-8, epochs=EPOCHS, clip_ratio=0.1, stories_per_opening=GROUP
)
SETTINGS = {
    "rloo": ALL | dict(learner="rloo", kl_in="reward", kl_coef=0.05),
    "grpo": ALL | dict(learner="grpo", kl_in="loss", kl_coef=0.3),
    "dr_grpo": ALL | dict(learner="dr_grpo", kl_in="loss", kl_coef=0.3),
    "dpo": ALL | dict(learner="dpo", clip_ratio=0.2, kl_coef=0.3),
    "sft-best": ALL | dict(learner="sft-best", kl_in="reward", kl_coef=0.0, adam_eps=1e-5),
}


def trainer_of(setting: dict, model, tokenizer):
    learner = setting["learner"]
    folder = tempfile.mkdtemp()
    common = dict(
        output_dir=folder, use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False
    )
    if learner == "sft-best":
        rows = Dataset.from_dict({"input_ids": [[7, 8, 9]], "labels": [[7, 8, 9]]})
        return SFTTrainer(
            model, args=SFTConfig(**common), train_dataset=rows, processing_class=tokenizer
        )
    if learner == "dpo":
        config = DPOConfig(**common, beta=setting["kl_coef"])
        rows = Dataset.from_list([dict(prompt="t7", chosen="t8", rejected="t9")])
        reference = random_gpt2(pad_token_id=PAD)
        reference.load_state_dict(model.state_dict())
        return DPOTrainer(
            model, reference, args=config, train_dataset=rows, processing_class=tokenizer
        )
    common |= dict(
        per_device_train_batch_size=len(OPENINGS) * GROUP,
        num_generations=GROUP,
        max_completion_length=LONGEST,
        num_iterations=EPOCHS,
        epsilon=setting["clip_ratio"],
        beta=0.0,
        temperature=1.0,
    )
    rows = Dataset.from_dict({"prompt": ["t7"] * len(OPENINGS)})
    made = dict(reward_funcs=lambda completions, **_: [0.0] * len(completions), train_dataset=rows)
    if learner == "rloo":
        trainer = RLOOTrainer(model, args=RLOOConfig(**common), processing_class=tokenizer, **made)
    else:
        scale = {"grpo": "group", "dr_grpo": "none"}[learner]
        # TRL's default multiplies GRPO's k3 by the ratio
        papers = dict(use_bias_correction_kl=False)
        config = GRPOConfig(**common, loss_type=learner, scale_rewards=scale, **papers)
        trainer = GRPOTrainer(model, args=config, processing_class=tokenizer, **made)
    trainer.beta, trainer.ref_model = setting["kl_coef"], copy_of(model)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def copy_of(model):
    """The frozen reference, with the LM head that TRL gives to one."""
    reference = random_gpt2(pad_token_id=PAD)
    reference.load_state_dict(model.state_dict())
    add_fused_lm_head(reference, temperature=1.0)
    return reference.eval()


@torch.no_grad()
def write_stories(model, batch: int) -> list[list[int]]:
    """Sampled token by token; three are cut short, so that lengths differ and some end with the end
    token."""
    torch.manual_seed(1 + batch)
    stories = []
    for opening in OPENINGS:
        for _ in range(GROUP):
            tokens = list(opening)
            while len(tokens) < len(opening) + LONGEST and tokens[-1] != EOS:
                logits = model(torch.tensor([tokens])).logits[0, -1]
                logits[PAD] = -torch.inf
                tokens.append(int(torch.multinomial(logits.softmax(-1), 1)))
            stories.append(tokens[len(opening) :])
    stories[0], stories[1], stories[6] = stories[0][:1], [EOS], [*stories[6][:5], EOS]
    return stories


def inputs_of(learner: str, trainer, stories: list[list[int]], scores: torch.Tensor):
    """The inputs of TRL's loss, as TRL's code computes them from these stories and scores."""
    prompts = [opening for opening in OPENINGS for _ in range(GROUP)]
    if learner == "sft-best":
        best = sorted(scores.argsort(descending=True)[: len(stories) // 4].tolist())
        width = len(OPENINGS[0]) + LONGEST
        ids, labels = torch.full((len(best), width), PAD), torch.full((len(best), width), -100)
        for row, i in enumerate(best):
            tokens = torch.tensor(prompts[i] + stories[i])
            ids[row, : len(tokens)] = tokens
            labels[row, len(prompts[i]) : len(tokens)] = torch.tensor(stories[i])
        return dict(input_ids=ids, labels=labels, attention_mask=(ids != PAD).long())
    if learner == "dpo":
        pairs = []
        for first in range(0, len(stories), GROUP):
            best = first + int(scores[first : first + GROUP].argmax())
            worst = first + int(scores[first : first + GROUP].argmin())
            pairs.append(
                dict(
                    prompt_ids=prompts[best], chosen_ids=stories[best], rejected_ids=stories[worst]
                )
            )
        return trainer.data_collator(pairs)
    texts = ["t"] * len(stories)
    if learner == "rloo":
        trainer._generate = lambda prompts_: (prompts, stories, texts)
    else:
        trainer._generate = lambda prompts_: (prompts, stories, None, texts, None, {}, None, None)
    trainer._calculate_rewards = lambda *_: scores[:, None]
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": "t7"}] * len(stories))


def main() -> None:
    warnings.filterwarnings("ignore")
    words = Tokenizer(
        models.WordLevel({f"t{i}": i for i in range(SHAPE["vocab_size"])}, unk_token="t0")
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t0", pad_token="t1", eos_token="t2"
    )
    tensors = {f"start/{name}": w for name, w in our_weights(random_gpt2(pad_token_id=PAD)).items()}
    for name, setting in SETTINGS.items():
        model = random_gpt2(pad_token_id=PAD)
        trainer = trainer_of(setting, model, tokenizer)
        optimizer = torch.optim.Adam(
            model.parameters(), lr=setting["learning_rate"], eps=setting["adam_eps"]
        )
        for batch in range(BATCHES):
            stories = write_stories(model, batch)
            scores = torch.rand(len(stories), generator=torch.Generator().manual_seed(100 + batch))
            inputs, losses, norms = inputs_of(setting["learner"], trainer, stories, scores), [], []
            for _ in range(EPOCHS):
                loss = trainer.compute_loss(model, copy.copy(inputs))
                optimizer.zero_grad()
                loss.backward()
                norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
                optimizer.step()
                losses.append(loss.detach())
            rows = [torch.tensor(story) for story in stories] + [torch.zeros(LONGEST).long()]
            lengths = torch.tensor([len(story) for story in stories])
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[:-1]
            record = dict(tokens=tokens, lengths=lengths, scores=scores, losses=torch.stack(losses))
            record["grad_norms"] = torch.stack(norms)
            if "advantages" in inputs:
                record["advantages"] = inputs["advantages"].clone()
            tensors |= {f"{name}/{batch}/{quantity}": x for quantity, x in record.items()}
            print(name, batch, [float(x) for x in losses], [float(x) for x in norms])
        tensors |= {f"{name}/weights/{part}": w for part, w in our_weights(model).items()}
    facts = dict(
        shape=SHAPE, openings=OPENINGS, longest=LONGEST, settings=SETTINGS, batches=BATCHES
    )
    file = Path(__file__).with_name("trl_learners.safetensors")
    save_file(
        {name: x.contiguous() for name, x in tensors.items()},
        file,
        metadata={"facts": json.dumps(facts)},
    )
    print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
