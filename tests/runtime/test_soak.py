"""Thousands of requests through one engine: nothing is left behind, neither blocks nor memory nor file handles.

At each change some hundreds through a tiny model; the thousands, through a trained one, are slow.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from functools import cache
from pathlib import Path

import pytest

from fusecomp.config import EngineConfig
from fusecomp.request import SamplingParams
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.loading import load_model
from fusecomp.runtime.scheduler import SequenceState
from models.registry import build

pytestmark = pytest.mark.xdist_group("soak")
PICO = Path(__file__).parents[2] / "models" / "pico-llama"
BLOCKS, BLOCK = 40, 16


@cache
def engine(trained: bool) -> Engine:
    model = load_model(PICO, "float32", "cpu")[0] if trained else build("llama")
    sizes = model.config
    per_block = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim * 4 * BLOCK
    config = EngineConfig(
        max_model_len=96, max_num_seqs=16, max_num_batched_tokens=128, kv_cache_bytes=BLOCKS * per_block,
        block_size=BLOCK, enforce_eager=True,
    )  # fmt: skip
    return Engine(model, config, eos_token_ids=(3, 4, 5))


def serve(served_by: Engine, rng: random.Random, count: int) -> None:
    """`count` requests, some with common prefixes, priorities or a cancellation, arriving in bursts."""
    words = range(6, served_by.vocab_size)
    prefixes = [rng.choices(words, k=40) for _ in range(5)]
    sent = ended = 0
    live: set[str] = set()
    while sent < count or served_by.has_unfinished_requests():
        for _ in range(min(rng.choice([0, 0, 1, 4, 12]), count - sent)):
            common = rng.choice(prefixes)[: rng.choice([0, 10, 33, 40])]
            prompt = common + rng.choices(words, k=rng.randint(1, 12))
            params = SamplingParams(temperature=rng.choice([0, 1.0]), max_tokens=rng.choice([1, 3, 10, 30]))
            served_by.add_request(str(sent), prompt, params, priority=rng.choice([0, 0, 0, 1]))
            live.add(str(sent))
            sent += 1
        if live and rng.random() < 0.1:
            victim = rng.choice(sorted(live))
            served_by.abort_request(victim)
            live.discard(victim)
            ended += 1
        for out in served_by.step():
            if out.finish_reason is not None:
                live.discard(out.request_id)
                ended += 1
    assert (sent, ended, live) == (count, count, set())


def resident() -> int:
    """Bytes of anonymous memory of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def sequences() -> dict[int, SequenceState]:
    """All that live in this process, other tests' engines' too, by identity."""
    return {id(seq): seq for seq in gc.get_objects() if type(seq) is SequenceState}


def handles() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("trained", "count"), [(False, 250), pytest.param(True, 5000, marks=pytest.mark.slow)], ids=["tiny", "pico"]
)
@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
def test_nothing_is_left_behind(trained, count, overlap):
    served_by, rng = engine(trained), random.Random(count)
    served_by.overlap = overlap
    serve(served_by, rng, max(100, count // 5))  # allocators and caches find their size
    gc.collect()
    others = sequences()  # kept, so that no later one is taken for one of them
    memory, objects = resident(), sys.getallocatedblocks()
    files, before = handles(), served_by.metrics
    serve(served_by, rng, count)
    served_by._flight = None
    gc.collect()
    more_memory, more_objects = resident() - memory, sys.getallocatedblocks() - objects
    print(
        f"{count} requests left {more_memory / 2**20:.2f} MiB, {more_objects} objects, {len(handles() - files)} files"
    )
    now, scheduler = served_by.metrics, served_by._scheduler
    assert now.requests - before.requests == now.finished - before.finished == count
    assert (now.running, now.waiting, now.kv_usage) == (0, 0, 0)
    assert now.preemptions > before.preemptions
    assert now.prefix_cache_hits > before.prefix_cache_hits
    assert scheduler.kv.num_free == scheduler.kv.num_blocks == BLOCKS
    assert scheduler.kv.pool.num_known <= BLOCKS
    assert not scheduler.kv._blocks
    assert not scheduler.prefix.makers
    assert sorted(scheduler._places.free_rows) == list(range(16))
    latest = sequences().keys() - others.keys()
    assert len(latest) <= 16, "sequences of the latest step may live on, others may not"
    assert handles() == files
    # Once for all: views of buffers for each size that was met, some 400 objects.
    assert more_objects < 600 + count // 4, "less than an object for every fourth request"
    assert more_memory < 8 << 20  # the allocator's own ups and downs are about 3 MiB
