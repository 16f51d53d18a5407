"""The block manager against a model of what every slot should hold."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from fusecomp.runtime.kv_cache import KVCacheManager

SIZE, BLOCKS = 3, 12


class BlockMachine(RuleBasedStateMachine):
    """Requests begin with what is cached of their tokens, append tokens and end in any order.

    Each must always read back exactly its own tokens. The model knows what was written into every slot, and which
    contents were named and not taken or forgotten since.
    """

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVCacheManager(num_blocks=BLOCKS, block_size=SIZE, prefix_caching=True)
        self.tokens: dict[str, list[int]] = {}
        self.names: dict[str, list[bytes]] = {}
        self.slots: dict[tuple[int, int], int] = {}
        self.count = 0

    def write(self, name: str, tokens: list[int]) -> None:
        for token in tokens:
            at = len(self.tokens[name])
            block = self.kv.block_ids(name)[at // SIZE]
            assert self.kv.pool.ref_count(block) == 1, "write to a shared block"
            assert not self.kv.pool.find_content(block), "write to a block that can be found"
            self.slots[block, at % SIZE] = token
            self.tokens[name].append(token)

    def grow(self, name: str, tokens: list[int]) -> bool:
        up_to = len(self.tokens[name]) + len(tokens)
        free, held = self.kv.num_free, self.kv.slots_needed(name, 10**6)
        could = self.kv.can_allocate(name, up_to)
        assert could == (self.kv.blocks_for(self.kv.slots_needed(name, up_to)) <= free)
        assert self.kv.allocate(name, up_to) == could
        if not could:
            assert (self.kv.num_free, self.kv.slots_needed(name, 10**6)) == (free, held), "a refusal changed something"
            return False
        self.write(name, tokens)
        return True

    # Few ids and short prompts, so that prefixes meet often.
    @rule(target=requests, prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def start(self, prompt):
        name, self.count = f"r{self.count}", self.count + 1
        most = (len(prompt) - 1) // SIZE
        names: list[bytes] = []
        self.kv.names.extend(names, prompt, most)
        found = self.kv.find_prefix(names, most)
        assert len(found) <= most
        free, idle = self.kv.num_free, self.kv.num_idle(found)
        self.kv.adopt(name, found)
        assert self.kv.num_free == free - idle
        cached = len(found) * SIZE
        self.tokens[name], self.names[name] = prompt[:cached], names[: len(found)]
        self.grow(name, prompt[cached:])
        return name

    @rule(name=requests, tokens=st.lists(st.integers(0, 1), max_size=7))
    def extend(self, name, tokens):
        self.grow(name, tokens)

    @rule(name=requests)
    def name_full_blocks(self, name):
        tokens, names = self.tokens[name], self.names[name]
        full = len(tokens) // SIZE
        known = self.kv.pool.num_known
        self.kv.names.extend(names, tokens, full)
        fresh = [n for n in names if self.kv.pool.find(n) is None]
        for block, content in zip(self.kv.block_ids(name), names, strict=False):
            self.kv.pool.name(block, content)
            assert self.kv.pool.find(content) is not None
        assert self.kv.pool.num_known == known + len(fresh)

    @rule(name=consumes(requests), forget=st.sampled_from([False, False, True]))
    def free(self, name, forget):
        private, free = self.kv.num_private(name), self.kv.num_free
        blocks = list(self.kv.block_ids(name))
        self.kv.free(name, forget=forget)
        assert self.kv.num_free == free + private
        assert not forget or not any(self.kv.pool.find_content(block) for block in blocks)
        del self.tokens[name]

    @rule()
    def forget_all(self):
        free = self.kv.num_free
        self.kv.pool.forget_all()
        assert (self.kv.num_free, self.kv.pool.num_known) == (free, 0)

    @invariant()
    def every_request_reads_its_own_tokens(self):
        for name, tokens in self.tokens.items():
            blocks = self.kv.block_ids(name)
            assert len(blocks) == self.kv.blocks_for(len(tokens))
            assert [self.slots[blocks[at // SIZE], at % SIZE] for at in range(len(tokens))] == tokens

    @invariant()
    def counts_are_right(self):
        owners = [0] * self.kv.num_blocks
        for name in self.tokens:
            for block in self.kv.block_ids(name):
                owners[block] += 1
        assert owners == [self.kv.pool.ref_count(block) for block in range(self.kv.num_blocks)]
        assert self.kv.num_free == owners.count(0)
        assert self.kv.usage == 1 - owners.count(0) / len(owners)
        shared = [block for block, count in enumerate(owners) if count > 1]
        assert all((block, SIZE - 1) in self.slots for block in shared), "only full blocks have two owners"

    def teardown(self):
        for name in self.tokens:
            self.kv.free(name)
        assert self.kv.num_free == self.kv.num_blocks, "leaked blocks"
        known = self.kv.pool.num_known
        taken = [self.kv.pool.allocate() for _ in range(BLOCKS)]
        assert sorted(taken) == list(range(BLOCKS))
        assert self.kv.pool.num_known == 0 <= known


BlockMachine.TestCase.settings = settings(stateful_step_count=40)
TestBlockMachine = BlockMachine.TestCase
