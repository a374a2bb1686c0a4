"""The accounts of the KV cache: against a naive model, step by step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sihe.serving.engine.kv.blocks import BLOCK_TOKENS, BlockPool, BlockTable, blocks_of, chain, root_key

ROOT = root_key(b"model@1")


@given(tokens=st.lists(st.integers(0, 2**40), max_size=70), cut=st.integers(0, 4))
def test_a_chain_goes_on_where_it_was_left(tokens: list[int], cut: int) -> None:
    keys = chain(ROOT, tokens)
    assert len(keys) == len(tokens) // BLOCK_TOKENS
    head = chain(ROOT, tokens[: cut * BLOCK_TOKENS])
    parent = head[-1] if head else ROOT
    assert head + chain(parent, tokens[len(head) * BLOCK_TOKENS :]) == keys


@given(
    tokens=st.lists(st.integers(0, 300), min_size=BLOCK_TOKENS, max_size=80),
    at=st.integers(0, 79),
    other=st.integers(0, 300),
)
def test_a_key_stands_for_every_token_before_it(tokens: list[int], at: int, other: int) -> None:
    at %= len(tokens)
    changed = [*tokens[:at], other, *tokens[at + 1 :]]
    same = [ours == theirs for ours, theirs in zip(chain(ROOT, tokens), chain(ROOT, changed), strict=True)]
    first = at // BLOCK_TOKENS
    assert same == [index < first or other == tokens[at] for index in range(len(same))]


def test_scopes_are_kept_apart() -> None:
    tokens = list(range(BLOCK_TOKENS))
    scopes = [(b"a", b"b"), (b"ab", b""), (b"", b"ab"), (b"a",), (b"b", b"a")]
    assert len({chain(root_key(*scope), tokens)[0] for scope in scopes}) == len(scopes)


def test_the_longest_known_beginning_is_found() -> None:
    pool = BlockPool(8)
    tokens = list(range(4 * BLOCK_TOKENS))
    keys = chain(ROOT, tokens)
    table = BlockTable(pool, ROOT, keys)
    table.grow(len(tokens))
    table.publish(3 * BLOCK_TOKENS + 5)  # the fourth is not full yet
    assert pool.find(keys) == table.blocks[:3]
    assert pool.find(chain(ROOT, [*tokens[:40], 999, *tokens[41:]])) == table.blocks[:2]
    assert pool.find(chain(root_key(b"model@2"), tokens)) == []
    first = table.blocks[:3]
    table.clear()
    assert (pool.num_used, pool.num_cached, pool.num_free) == (0, 3, 5)
    again = BlockTable(pool, ROOT, keys)
    assert again.reuse(pool.find(keys)) == 48
    assert again.blocks == first


def test_the_deepest_of_the_longest_unused_goes_first() -> None:
    pool = BlockPool(4)
    old, young = chain(root_key(b"old"), list(range(32))), chain(root_key(b"young"), list(range(32)))
    for keys in (old, young):
        table = BlockTable(pool, ROOT, keys)
        table.grow(32)
        table.publish(32)
        table.clear()
    pool.allocate(1)
    assert (len(pool.find(old)), len(pool.find(young))) == (1, 2)
    pool.hold(pool.find(old))  # used again: now the other one is the older
    pool.allocate(2)
    assert (len(pool.find(old)), len(pool.find(young)), pool.evictions) == (1, 0, 3)


def test_nobody_gets_more_than_there_is() -> None:
    pool = BlockPool(3)
    table = BlockTable(pool, ROOT, [])
    table.grow(33)
    with pytest.raises(ValueError, match="1 blocks are needed and 0 are available"):
        table.grow(49)
    assert len(table.blocks) == pool.num_used == 3
    table.trim(16)
    assert (len(table.blocks), pool.num_free) == (1, 2)
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)


def test_forgetting_leaves_what_is_held() -> None:
    pool = BlockPool(4)
    keys = chain(ROOT, list(range(32)))
    held, idle = BlockTable(pool, ROOT, keys), BlockTable(pool, ROOT, chain(root_key(b"x"), list(range(32))))
    for table in (held, idle):
        table.grow(32)
        table.publish(32)
    idle.clear()
    pool.forget()
    assert (pool.find(keys), pool.num_used, pool.num_cached, pool.num_free) == ([], 2, 0, 2)
    held.clear()
    assert (pool.num_used, pool.num_cached, pool.num_free) == (0, 0, 4)


class Accounts(RuleBasedStateMachine):
    """Sequences over a small alphabet, so that they share beginnings; every block is followed by hand."""

    @initialize(blocks=st.integers(1, 10))
    def begin(self, blocks: int) -> None:
        self.pool = BlockPool(blocks)
        self.tables: list[tuple[BlockTable, list[int]]] = []
        self.offered: dict[int, int] = {}  # by table: blocks that were offered to the index, once each
        self.content: dict[int, tuple[int, ...]] = {}  # what was computed into each block: all tokens up to its end
        self.known: dict[int, tuple[int, ...]] = {}  # the blocks that may be found, by what the naive model published

    @rule(letters=st.lists(st.integers(0, 1), min_size=1, max_size=5), extra=st.integers(0, 15))
    def start(self, letters: list[int], extra: int) -> None:
        tokens = [letter for letter in letters for _ in range(BLOCK_TOKENS)] + [7] * extra
        table = BlockTable(self.pool, ROOT, chain(ROOT, tokens))
        found = self.pool.find(table.keys)
        for index, block in enumerate(found):  # what is found holds exactly these tokens
            assert self.content[block] == tuple(tokens[: (index + 1) * BLOCK_TOKENS])
        longer = tuple(tokens[: (len(found) + 1) * BLOCK_TOKENS])
        if len(longer) == (len(found) + 1) * BLOCK_TOKENS:  # and nothing that is known was missed
            assert longer not in self.known.values()
        if blocks_of(len(tokens)) - len(found) + self.pool.num_unheld(found) > self.pool.num_available:
            return
        held = {block for other, _ in self.tables for block in other.blocks}
        cached = self.pool.num_cached
        table.reuse(found)
        assert self.pool.num_cached == cached - len(set(found) - held)
        table.grow(len(tokens))
        fresh = table.blocks[len(found) :]
        assert not set(fresh) & (held | set(found)), "a held block was given away"
        for block in fresh:
            self.known.pop(block, None)
            self.content.pop(block, None)
        self.tables.append((table, tokens))
        self.offered[id(table)] = len(found)

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 99), share=st.floats(0, 1))
    def compute(self, pick: int, share: float) -> None:
        table, tokens = self.tables[pick % len(self.tables)]
        computed = int(share * len(tokens))
        for index in range(self.offered[id(table)], computed // BLOCK_TOKENS):
            self.offered[id(table)] = index + 1
            block, upto = table.blocks[index], tuple(tokens[: (index + 1) * BLOCK_TOKENS])
            self.content[block] = upto
            if upto not in self.known.values():
                self.known[block] = upto
        table.publish(computed)

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 99))
    def end(self, pick: int) -> None:
        table, _ = self.tables.pop(pick % len(self.tables))
        table.clear()

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 99))
    def give_back_the_last(self, pick: int) -> None:
        table, tokens = self.tables[pick % len(self.tables)]
        if len(tokens) % BLOCK_TOKENS and len(table.blocks) == blocks_of(len(tokens)):
            del tokens[len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS :]
            table.trim(len(tokens))

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.known.clear()

    @invariant()
    def accounts_agree(self) -> None:
        counts: dict[int, int] = {}
        for table, _ in self.tables:
            assert len(set(table.blocks)) == len(table.blocks)
            for block in table.blocks:
                counts[block] = counts.get(block, 0) + 1
        references = [self.pool.references(block) for block in range(self.pool.num_blocks)]
        assert references == [counts.get(block, 0) for block in range(self.pool.num_blocks)]
        assert self.pool.num_used == len(counts)
        assert self.pool.num_cached == len(set(self.known) - set(counts))
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_used == self.pool.num_blocks
        assert self.pool.num_available == self.pool.num_blocks - len(counts)


Accounts.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAccounts = Accounts.TestCase
