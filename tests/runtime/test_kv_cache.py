import pytest

from fusecomp.runtime.kv_cache import BlockPool, ContentNames, KVCacheManager


def named(kv: KVCacheManager, request: str, tokens: list[int]) -> list[bytes]:
    """Serve a request of `tokens` up to the naming of its full blocks; returns their names."""
    names: list[bytes] = []
    full = len(tokens) // kv.block_size
    kv.names.extend(names, tokens, full)
    kv.adopt(request, kv.find_prefix(names, full))
    assert kv.allocate(request, len(tokens))
    for block, name in zip(kv.block_ids(request), names, strict=False):
        kv.pool.name(block, name)
    return names


def test_a_name_tells_the_block_its_prefix_and_the_engine():
    size, names = 4, ContentNames(4)

    def of(tokens, by=names):
        out: list[bytes] = []
        by.extend(out, tokens, len(tokens) // size)
        return out

    one = of([1, 2, 3, 4, 5, 6, 7, 8])
    assert of([1, 2, 3, 4, 5, 6, 7, 8, 9]) == one
    assert of([1, 2, 3, 4, 5, 6, 7, 9])[0] == one[0]
    others = [of([1, 2, 3, 4, 5, 6, 7, 9])[1], of([0, 2, 3, 4, 5, 6, 7, 8])[1], of([5, 6, 7, 8])[0]]
    assert one[1] not in others
    assert of([1, 2, 3, 4], ContentNames(4)) != one[:1]
    # Ids are told apart whatever their size: no two lists of ids give the same bytes.
    assert of([1, 0, 0, 0]) != of([1 << 8, 0, 0, 0]) != of([1 << 40, 0, 0, 0])
    longer = list(one)
    names.extend(longer, [*range(1, 13)], 3)
    assert longer[:2] == one
    assert longer == of([*range(1, 13)])
    with pytest.raises(AssertionError, match="not full"):
        names.extend(longer, [*range(1, 15)], 4)


def test_full_blocks_are_shared_and_what_follows_is_not():
    kv = KVCacheManager(num_blocks=8, block_size=4, prefix_caching=True)
    named(kv, "a", [*range(10)])
    named(kv, "b", [*range(9), 77])
    assert (kv.block_ids("a"), kv.block_ids("b")) == ([0, 1, 2], [0, 1, 3])
    assert [kv.pool.ref_count(b) for b in range(4)] == [2, 2, 1, 1]
    assert (kv.num_private("a"), kv.num_private("a", but=[2])) == (1, 0)
    kv.free("a")
    assert kv.num_free == 5
    kv.free("b")
    assert kv.num_free == 8


def test_free_blocks_keep_their_content_until_the_least_recently_used_is_taken():
    kv = KVCacheManager(num_blocks=5, block_size=2, prefix_caching=True)
    first, second = named(kv, "first", [1, 2, 3, 4]), named(kv, "second", [5, 6])
    kv.free("first")  # blocks 1, then 0
    kv.free("second")
    assert kv.num_free == 5
    assert kv.find_prefix(first, 2) == [0, 1]
    named(kv, "blank", [7, 8, 9])  # 3 and 4 hold nothing and go first
    assert kv.block_ids("blank") == [3, 4]
    assert kv.num_idle(kv.find_prefix(first, 2)) == 2
    kv.adopt("again", kv.find_prefix(second, 1))  # in use: it cannot be taken
    assert kv.num_free == 2
    assert kv.allocate("more", 2)
    assert kv.block_ids("more") == [1], "the end of a prefix goes before its beginning"
    assert (kv.find_prefix(first, 2), kv.find_prefix(second, 1)) == ([0], [2])
    assert kv.allocate("most", 2)
    assert (kv.find_prefix(first, 2), kv.num_free) == ([], 0)


def test_of_two_equal_blocks_the_first_is_known():
    kv = KVCacheManager(num_blocks=4, block_size=2, prefix_caching=True)
    names: list[bytes] = []
    kv.names.extend(names, [1, 2], 1)
    for request in "ab":  # both computed it at the same time
        assert kv.allocate(request, 2)
    for request in "ab":
        kv.pool.name(kv.block_ids(request)[0], names[0])
    assert kv.find_prefix(names, 1) == [0]
    kv.free("a")
    kv.free("b")
    assert kv.find_prefix(names, 1) == [0]
    assert kv.pool.num_known == 1


def test_what_is_forgotten_is_not_found_but_still_owned():
    kv = KVCacheManager(num_blocks=4, block_size=2, prefix_caching=True)
    names = named(kv, "a", [1, 2, 3, 4])
    named(kv, "b", [1, 2, 9])
    kv.free("a", forget=True)
    assert kv.find_prefix(names, 2) == []
    assert kv.block_ids("b") == [0, 2]
    assert (kv.num_free, kv.pool.num_known) == (2, 0)
    kv.free("b")
    assert kv.num_free == 4


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
    pool.name(block, b"content")
    with pytest.raises(AssertionError, match="changed its content"):
        pool.name(block, b"other")
    pool.forget(block)
    pool.free(block)
    with pytest.raises(AssertionError, match="already free"):
        pool.free(block)
    with pytest.raises(AssertionError, match="is free"):
        pool.share(block)
    with pytest.raises(AssertionError, match="is free"):
        pool.name(block, b"content")
