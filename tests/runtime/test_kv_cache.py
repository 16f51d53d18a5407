import pytest

from fusecomp.runtime.kv_cache import BlockPool, KVCacheManager


def test_fork_shares_full_blocks_and_copies_the_partial_one():
    kv = KVCacheManager(num_blocks=8, block_size=4)
    assert kv.allocate("a", 10)
    assert kv.fork("a", "b") == [(2, 3)]
    assert (kv.block_ids("a"), kv.block_ids("b")) == ([0, 1, 2], [0, 1, 3])
    assert [kv.pool.ref_count(b) for b in range(4)] == [2, 2, 1, 1]
    kv.free("a")
    assert kv.num_free == 5
    kv.free("b")
    assert kv.num_free == 8


def test_fork_of_full_blocks_copies_nothing_and_needs_no_block():
    kv = KVCacheManager(num_blocks=2, block_size=4)
    assert kv.allocate("a", 8)
    assert kv.fork("a", "b") == []
    assert not kv.can_allocate("b", 9)
    kv.free("a")
    assert kv.num_free == 0


def test_fork_without_a_block_for_the_copy_changes_nothing():
    kv = KVCacheManager(num_blocks=1, block_size=4)
    assert kv.allocate("a", 3)
    assert kv.fork("a", "b") is None
    with pytest.raises(KeyError):
        kv.block_ids("b")


def test_needs_and_refusals_are_exact():
    kv = KVCacheManager(num_blocks=3, block_size=4)
    assert kv.slots_needed("a", 5) == 5
    assert kv.allocate("a", 5)
    assert (kv.slots_needed("a", 8), kv.slots_needed("a", 9)) == (0, 1)
    assert not kv.allocate("a", 13)
    assert kv.num_free == 1
    assert kv.allocate("a", 12)
    assert kv.usage == 1


def test_misuse_of_the_pool_fails():
    pool = BlockPool(1)
    block = pool.allocate()
    with pytest.raises(AssertionError, match="empty"):
        pool.allocate()
    pool.free(block)
    with pytest.raises(AssertionError, match="already free"):
        pool.free(block)
    with pytest.raises(AssertionError, match="is free"):
        pool.share(block)
