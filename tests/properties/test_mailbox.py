"""The mailbox between a host and a device that runs behind it: whatever waits in the queue, every step sees its
own letter, continues from the ids of the step before, and the host reads each step's own ids."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from fusecomp.lowerings.letter import deliver_reference, feed_reference
from fusecomp.runtime.mailbox import Mailbox

ROWS, PAGES = 5, 3


class Device:
    """Runs what was queued, in order, when told to."""

    def __init__(self) -> None:
        self.queue: deque[Callable[[], None]] = deque()

    def run(self, count: int) -> None:
        for _ in range(min(count, len(self.queue))):
            self.queue.popleft()()


class QueuedMailbox(Mailbox):
    """Its kernels wait in the device's queue, and time passes for the device while the host waits."""

    def __init__(self, device: Device) -> None:
        super().__init__(ROWS, torch.device("cpu"))
        self.device = device
        self._feed = lambda *args: device.queue.append(lambda: feed_reference(*args))
        self._deliver = lambda *args: device.queue.append(lambda: deliver_reference(*args))
        self._drain = lambda: device.run(len(device.queue))

    def wait(self) -> None:
        while self._taken[0] != self._header[0]:
            assert self.device.queue, "the host waits for a step that was never launched"
            self.device.run(1)
        super().wait()


@dataclass
class Step:
    """What a step is to see and to sample."""

    number: int
    size: int
    half: int
    tokens: list[int]
    lengths: list[int]
    ids: list[int]


class Engine:
    """The host's side, as `runtime/engine.py` has it, with numbers for a model."""

    def __init__(self) -> None:
        self.device = Device()
        self.mailbox = QueuedMailbox(self.device)
        self.tokens = torch.zeros(3 * ROWS, dtype=torch.int64)
        self.lengths, self.tables = torch.zeros(ROWS, dtype=torch.int32), torch.zeros(ROWS, PAGES, dtype=torch.int32)
        self.sampled = torch.zeros(ROWS, dtype=torch.int64)
        self.wanted_tables = torch.zeros(ROWS * PAGES, dtype=torch.int32)
        self.flights: list[Step] = []
        self.latest: Step | None = None
        self.count = self.runs = 0

    def body(self, step: Step) -> Callable[[], None]:
        """The step's own work, which checks what it is given."""
        tables = self.wanted_tables.clone()

        def run() -> None:
            assert self.tokens[: 3 * step.size].tolist() == step.tokens
            assert self.lengths[: step.size].tolist() == step.lengths
            assert torch.equal(self.tables.view(-1), tables)
            self.sampled[: step.size] = torch.tensor(step.ids)
            self.runs += 1

        return run

    def launch(self, data: st.DataObject, in_graph: bool) -> None:
        """A step of decodes that may continue from the one before."""
        draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
        size, before = data.draw(st.integers(1, ROWS)), self.latest
        self.mailbox.wait()
        arrays, self.count = self.mailbox.arrays, self.count + 1
        names = ("ids", "slots", "seq_lens")
        ids_, slots, lengths = (torch.randint(0, 1000, (size,), generator=draw).tolist() for _ in names)
        for name, values in zip(names, (ids_, slots, lengths), strict=True):
            arrays[name][:size] = values
        tokens = [*ids_, *(max(length - 1, 0) for length in lengths), *slots]
        count = 0 if before is None else data.draw(st.integers(0, size))
        for row in range(count):
            source = data.draw(st.integers(-1, before.size - 1))
            arrays["continues"][row] = source
            if source >= 0:
                tokens[row] = max(before.ids[source], 0)
        places = data.draw(st.lists(st.integers(0, ROWS * PAGES - 1), max_size=ROWS, unique=True))
        for i, place in enumerate(places):
            arrays["moved_at"][i], arrays["moved_to"][i] = place, self.count
            self.wanted_tables[place] = self.count
        ids = [self.count * 10 + row if data.draw(st.booleans()) else -1 for row in range(size)]
        step = self.latest = Step(self.count, size, self.count % 2, tokens, lengths, ids)
        self.mailbox.send(count, len(places), step.half)
        self.mailbox.feed(self.tokens, self.lengths, self.tables, size)
        self.device.queue.append(self.body(step))
        self.mailbox.deliver(self.sampled[:size], None if in_graph else step.half)
        self.flights.append(step)

    def again(self, times: int) -> None:
        """Replays of the latest step, not waited for."""
        for _ in range(times if self.latest else 0):
            self.mailbox.feed(self.tokens, self.lengths, self.tables, self.latest.size)
            self.device.queue.append(self.body(self.latest))
            self.mailbox.deliver(self.sampled[: self.latest.size])
        self.mailbox.hold()

    def read(self) -> None:
        """The oldest step's ids, whose delivery an event follows."""
        step = self.flights.pop(0)
        self.device.run(len(self.device.queue) if not self.flights else 0)
        while not torch.equal(self.mailbox.delivered[step.half, : step.size], torch.tensor(step.ids)):
            assert self.device.queue, f"step {step.number} delivered {self.mailbox.delivered.tolist()}, not {step.ids}"
            self.device.run(1)


@given(st.data())
def test_every_step_sees_its_own_letter(data):
    engine, launched = Engine(), 0
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["launch", "launch", "read", "again", "run"]))
        if action == "launch":
            if len(engine.flights) == 2:  # the step before the last one is read before another is launched
                engine.read()
            engine.launch(data, in_graph=data.draw(st.booleans()))
            launched += 1
        elif action == "read" and engine.flights:
            engine.read()
        elif action == "again":
            engine.again(data.draw(st.integers(1, 3)))
        elif action == "run":
            engine.device.run(data.draw(st.integers(1, 6)))
    while engine.flights:
        engine.read()
    engine.device.run(len(engine.device.queue))
    assert engine.runs >= launched


def test_without_hold_a_replay_would_take_the_next_letter():
    """What `hold` is for: the check above would notice."""

    class Careless(Engine):
        def again(self, times: int) -> None:
            super().again(times)
            self.mailbox._held = False

    noticed = []

    @given(st.data())
    def search(data):
        engine = Careless()
        engine.launch(data, in_graph=True)
        engine.mailbox.wait()
        engine.again(1)
        engine.launch(data, in_graph=True)
        try:
            engine.device.run(len(engine.device.queue))
        except AssertionError:
            noticed.append(True)

    search()
    assert noticed
