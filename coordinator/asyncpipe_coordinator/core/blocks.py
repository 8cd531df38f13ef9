"""The books of the key-value cache: who owns how many blocks.

All stages hold the same sequences with the same lengths, so one ledger, with the capacity of the stage that has the least room,
is true for all of them. A block holds the keys and values of `block_tokens` tokens in every layer of a stage.
"""

from __future__ import annotations


class BlockLedger:
    def __init__(self, *, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self._block_tokens = block_tokens
        self._owned: dict[int, int] = {}  # blocks by sequence number
        self._num_used = 0

    @property
    def num_free(self) -> int:
        return self.num_blocks - self._num_used

    @property
    def num_used(self) -> int:
        return self._num_used

    @property
    def max_tokens(self) -> int:
        """The longest sequence that fits when it is alone."""
        return self.num_blocks * self._block_tokens

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def reserve(self, number: int, num_tokens: int) -> bool:
        """Let sequence `number` own blocks for `num_tokens` in total; False, and nothing changed, when there are not enough."""
        more = self.blocks_for(num_tokens) - self._owned.get(number, 0)
        if more > self.num_free:
            return False
        if more > 0:
            self._owned[number] = self._owned.get(number, 0) + more
            self._num_used += more
        return True

    def free(self, number: int) -> None:
        self._num_used -= self._owned.pop(number, 0)

    def owners(self) -> set[int]:
        return set(self._owned)

    def check(self) -> None:
        """Raises AssertionError."""
        if sum(self._owned.values()) != self._num_used or not 0 <= self._num_used <= self.num_blocks:
            raise AssertionError(f"{self._owned} are not {self._num_used} of {self.num_blocks} blocks")
