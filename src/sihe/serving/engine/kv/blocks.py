"""Which blocks of the KV cache are free, who holds the others, and which tokens they are known to be for.

A block is the keys and values of `BLOCK_TOKENS` tokens. It is in one of three states:

    FREE    nobody holds it and nothing is known of it
    HELD    one or more sequences hold it (a count of references)
    CACHED  nobody holds it, and its content is known by a key: it can be held again, or evicted

A full block is known by a key that stands for *all* tokens up to its end: the hash of its own tokens and the key of the
block before. So the longest known prefix of a prompt is found by one look-up a block, and two sequences that begin
alike hold the same blocks. The chain begins with a salt (model version, adapter, tenant where tenants are kept apart,
and a secret of this process), and the hash is BLAKE2b at 128 bits: no prompt can be made that lands in the cache of
another one. (The idea: vLLM's automatic prefix caching, https://docs.vllm.ai/en/latest/design/prefix_caching.html.)

Evicted is the block that has been without a holder for longest, and of one sequence the deepest first, since a block
is of use only with all before it. Pure accounting: no tensors, no threads, no clock. Every operation is O(1) a block.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

BLOCK_TOKENS = 16
"""Tokens of a block: as many as float32 lanes of the widest registers, and vLLM's default."""

_KEY_BYTES = 16


def blocks_of(tokens: int) -> int:
    """Blocks that `tokens` take."""
    return -(-tokens // BLOCK_TOKENS)


def root_key(*scope: bytes) -> bytes:
    """Where the chain of keys begins: one for each `scope`, whose parts are kept apart whatever they hold."""
    state = blake2b(digest_size=_KEY_BYTES, person=b"sihe kv scope")
    for part in scope:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.digest()


def chain(parent: bytes, tokens: Sequence[int]) -> list[bytes]:
    """The keys of the full blocks of `tokens` that follow the block of key `parent` (or a root)."""
    keys: list[bytes] = []
    data = array("q", tokens)
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        parent = blake2b(parent + data[start : start + BLOCK_TOKENS].tobytes(), digest_size=_KEY_BYTES).digest()
        keys.append(parent)
    return keys


class BlockPool:
    """The ids `0 .. num_blocks - 1`, with counts of references and an index by key."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool has at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.evictions = 0
        self._references = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack; low ids first, so that little memory is touched
        self._cached: OrderedDict[int, None] = OrderedDict()  # the one to evict first comes first

    @property
    def num_free(self) -> int:
        """Blocks of which nothing is known."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that can be found by their key."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._cached)

    def references(self, block: int) -> int:
        """How many hold `block`."""
        return self._references[block]

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known beginning of `keys`. Changes nothing: `hold` them before anything else."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_unheld(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` holding them would take from what is available."""
        references = self._references
        return sum(references[block] == 0 for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each of `blocks`, which are held or cached."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of unknown content with one reference each, evicting what is cached if need be.

        Raises `ValueError`, and changes nothing, where fewer are available: who plans looks before.
        """
        if count > self.num_available:
            raise ValueError(f"{count} blocks are needed and {self.num_available} are available")
        blocks: list[int] = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Makes `block`, which is held and computed to its end, findable by `key`.

        Where another block is known by this key already the first one stays, and `block` goes unknown.
        """
        if self._keys[block] is None and key not in self._by_key:
            self._keys[block] = key
            self._by_key[key] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Takes one reference of each of a sequence's `blocks` back, which stand in its own order."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def forget(self) -> None:
        """Forgets every key: nothing computed until now is found again. Held blocks stay held."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._by_key.clear()
        self._keys = [None] * self.num_blocks

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._keys[block]
        assert key is not None, "a cached block has a key"
        del self._by_key[key]
        self._keys[block] = None
        self.evictions += 1
        return block


class BlockTable:
    """The blocks of one sequence: block i holds its positions `16 i .. 16 i + 15`.

    `keys` name its full blocks as far as its tokens are known: those of the prompt at first, more as the answer grows.
    """

    __slots__ = ("_pool", "_published", "blocks", "keys", "root")

    def __init__(self, pool: BlockPool, root: bytes, keys: list[bytes]) -> None:
        self._pool = pool
        self._published = 0
        self.root = root
        self.keys = keys
        self.blocks: list[int] = []

    def missing(self, tokens: int) -> int:
        """Blocks that are to be added before `tokens` fit."""
        return max(0, -(-tokens // BLOCK_TOKENS) - len(self.blocks))

    def reuse(self, blocks: list[int]) -> int:
        """Begins with `blocks` that were found; the tokens that they hold."""
        assert not self.blocks, "a table begins with what it reuses"
        self._pool.hold(blocks)
        self.blocks = list(blocks)
        self._published = len(blocks)
        return len(blocks) * BLOCK_TOKENS

    def grow(self, tokens: int) -> None:
        """Adds blocks until `tokens` fit. Raises as `allocate` does."""
        if missing := self.missing(tokens):
            self.blocks += self._pool.allocate(missing)

    def publish(self, computed: int) -> None:
        """Makes the full blocks among the first `computed` tokens findable, as far as their keys are known."""
        for index in range(self._published, min(computed // BLOCK_TOKENS, len(self.keys))):
            self._pool.publish(self.blocks[index], self.keys[index])
            self._published = index + 1

    def trim(self, tokens: int) -> None:
        """Gives back the blocks past `tokens`."""
        keep = blocks_of(tokens)
        if keep < len(self.blocks):
            self._pool.release(self.blocks[keep:])
            del self.blocks[keep:]

    def clear(self) -> None:
        """Gives everything back; what was published stays cached."""
        self._pool.release(self.blocks)
        self.blocks = []
        self._published = 0
