"""The block manager against a model of what every slot should hold."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from fusecomp.runtime.kv_cache import KVCacheManager


class BlockMachine(RuleBasedStateMachine):
    """Requests append tokens, fork and end in any order; each must always read back exactly its own tokens."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVCacheManager(num_blocks=12, block_size=3)
        self.tokens: dict[str, list[int]] = {}
        self.slots: dict[tuple[int, int], int] = {}
        self.names = iter(range(10**6))
        self.written = iter(range(10**6))

    def write(self, name: str, count: int) -> None:
        for _ in range(count):
            token, at = next(self.written), len(self.tokens[name])
            block = self.kv.block_ids(name)[at // 3]
            assert self.kv.pool.ref_count(block) == 1, "write to a shared block"
            self.slots[block, at % 3] = token
            self.tokens[name].append(token)

    def grow(self, name: str, count: int) -> bool:
        up_to = len(self.tokens.get(name, ())) + count
        free, held = self.kv.num_free, self.kv.slots_needed(name, 10**6)
        could = self.kv.can_allocate(name, up_to)
        assert could == (self.kv.blocks_for(self.kv.slots_needed(name, up_to)) <= free)
        assert self.kv.allocate(name, up_to) == could
        if not could:
            assert (self.kv.num_free, self.kv.slots_needed(name, 10**6)) == (free, held), "a refusal changed something"
            return False
        self.tokens.setdefault(name, [])
        self.write(name, count)
        return True

    @rule(target=requests, count=st.integers(1, 14))
    def start(self, count):
        name = f"r{next(self.names)}"
        return name if self.grow(name, count) else multiple()

    @rule(name=requests, count=st.integers(0, 7))
    def extend(self, name, count):
        self.grow(name, count)

    @rule(target=requests, parent=requests)
    def fork(self, parent):
        child = f"r{next(self.names)}"
        free = self.kv.num_free
        copies = self.kv.fork(parent, child)
        if copies is None:
            assert free == 0
            assert len(self.tokens[parent]) % 3
            assert self.kv.num_free == free
            return multiple()
        assert len(copies) == (len(self.tokens[parent]) % 3 > 0)
        for src, dst in copies:
            assert self.kv.pool.ref_count(dst) == 1
            for offset in range(3):
                self.slots[dst, offset] = self.slots.get((src, offset), -1)
        self.tokens[child] = list(self.tokens[parent])
        return child

    @rule(name=consumes(requests))
    def free(self, name):
        self.kv.free(name)
        del self.tokens[name]

    @invariant()
    def every_request_reads_its_own_tokens(self):
        for name, tokens in self.tokens.items():
            blocks = self.kv.block_ids(name)
            assert len(blocks) == self.kv.blocks_for(len(tokens))
            assert [self.slots[blocks[at // 3], at % 3] for at in range(len(tokens))] == tokens

    @invariant()
    def counts_are_right(self):
        owners = [0] * self.kv.num_blocks
        for name in self.tokens:
            for block in self.kv.block_ids(name):
                owners[block] += 1
        assert owners == [self.kv.pool.ref_count(block) for block in range(self.kv.num_blocks)]
        assert self.kv.num_free == owners.count(0)
        assert self.kv.usage == 1 - owners.count(0) / len(owners)

    def teardown(self):
        for name in self.tokens:
            self.kv.free(name)
        assert self.kv.num_free == self.kv.num_blocks, "leaked blocks"
        assert sorted(self.kv.pool.allocate() for _ in range(12)) == list(range(12))


BlockMachine.TestCase.settings = settings(stateful_step_count=40)
TestBlockMachine = BlockMachine.TestCase
