"""Few rows through the experts that they have chosen, by compiled kernels alone.

Each row goes through its experts by itself. Which ones these are is known to kernels only, not to Python: so a decode step of a
mixture of experts can be replayed from a tape. Shapes: T rows, N experts of each, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from asyncpipe_workers.models.row_kernels import row_kernel
from asyncpipe_workers.tape import OtherCalls, Tape, TapeMemory, new_tensor, recording

Expert = Callable[[torch.Tensor], torch.Tensor]
"""(1, D) to (1, D)."""


class ExpertCalls:
    """What experts call, noted down once. Raises NotImplementedError where that is not compiled kernels alone."""

    def __init__(self, experts: Sequence[Expert], hidden_size: int) -> None:
        self._x_1D = torch.empty(1, hidden_size)
        self._one = torch.ones(1)
        weigh, add_weighed = (row_kernel("WeightedRows", self._x_1D, hidden_size, is_added) for is_added in (False, True))
        if weigh is None or add_weighed is None:
            raise NotImplementedError(f"no kernels for rows of {hidden_size}")
        from asyncpipe_workers.compiled.chain import CallLists

        self._weigh, self._add_weighed = weigh, add_weighed
        memory = TapeMemory()
        tapes = [Tape(memory, is_dry=True) for _ in experts]
        results = [self._noted(expert, tape) for expert, tape in zip(experts, tapes, strict=True)]
        if len({(result.data_ptr(), len(tape.calls)) for result, tape in zip(results, tapes, strict=True)}) > 1:
            raise NotImplementedError("experts are not alike")
        self._y_1D = results[0]
        self._compute = CallLists(tapes)

    def __call__(self, x_TD: torch.Tensor, chosen_TN: torch.Tensor, shares_TN: torch.Tensor) -> torch.Tensor:
        """(T, D): what each row's experts (int64) make of it, times their shares, added up in their order."""
        counts = (1, x_TD.shape[1])
        out_TD = new_tensor(*x_TD.shape)
        for row, out_D in enumerate(out_TD):
            self._weigh((x_TD[row], self._x_1D, self._one), counts)
            for n, share in enumerate(shares_TN[row]):
                self._compute(chosen_TN[row, n])
                use = self._add_weighed if n else self._weigh
                use((self._y_1D, out_D, share), counts)
        return out_TD

    def _noted(self, expert: Expert, tape: Tape) -> torch.Tensor:
        """Where its result will be: that of all of them, for one is computed at a time."""
        tape.memory.begin_again()
        with recording(tape), OtherCalls() as others:
            result = expert(self._x_1D)
        if others.found:
            raise NotImplementedError(f"{min(others.found)} is not compiled")
        return result
