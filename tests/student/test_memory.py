"""What a run needs is counted before it is allocated."""

import tracemalloc
from dataclasses import replace

import pytest
import torch

from tinystory.config import InteractConfig
from tinystory.rl.replay import CorpusReplay
from tinystory.student import checkpoint, memory


def needed(config, shape, monkeypatch) -> int:
    """Bytes that the check asks for."""
    counts = []
    monkeypatch.setattr(memory, "require", lambda count, device, advice: counts.append(count))
    memory.require_for_interaction(config, shape, torch.device("cpu"))
    return counts[0]


@pytest.mark.parametrize("updates", [1, 4])
def test_the_batches_that_a_step_replays_are_counted(place, monkeypatch, updates):
    monkeypatch.setattr("tinystory.data.shards.cache_dir", lambda: place / "cache")
    student, tokenizer, history = checkpoint.load(checkpoint.newest(place / "p"))
    config = InteractConfig(
        replay_weight=0.1,
        replay_batch=20_000,
        stories_per_step=4,
        minibatch_size=4 // updates,
    )
    replay = CorpusReplay(config, history, tokenizer, student.config.context)
    tracemalloc.start()
    texts = replay.batches(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(texts) == updates
    without = replace(config, replay_weight=0.0)
    counted = needed(config, student.config, monkeypatch)
    counted -= needed(without, student.config, monkeypatch)
    assert counted <= peak <= 1.5 * counted
