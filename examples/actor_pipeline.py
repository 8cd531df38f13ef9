"""The actor runtime by itself: three processes pass numpy arrays along, and the last answers questions.

This process is the source. It starts `Scale` and `Total` in child processes, introduces one to the other, and sends.
"""

import asyncio
import sys
from typing import Any, ClassVar

import numpy as np

from asyncpipe.actors import Actor, ActorRef, ActorSystem
from asyncpipe.wire.messages import Message, Request
from asyncpipe.wire.tensors import Tensor


class Rows(Message, frozen=True, kw_only=True):
    """An array on its way."""

    values: Tensor


class Done(Message, frozen=True, kw_only=True):
    address: str = ""


class Listen(Request[Done], frozen=True, kw_only=True):
    """Where can others reach you?"""


class Follow(Request[Done], frozen=True, kw_only=True):
    """Send your results to the actor `name` at `address`."""

    address: str
    name: str


class Sum(Message, frozen=True, kw_only=True):
    value: float
    num_arrays: int


class GetSum(Request[Sum], frozen=True, kw_only=True):
    """How much has arrived?"""


class Scale(Actor):
    """Doubles what it gets and passes it on."""

    receives: ClassVar[Any] = Rows | Follow
    following: ActorRef

    async def handle(self, message: Rows | Follow) -> Done | None:
        if isinstance(message, Follow):
            self.following = await self.system.connect(message.address, actor=message.name)
            return Done()
        await self.following.tell(Rows(values=Tensor.from_numpy(message.values.numpy() * 2)))
        return None


class Total(Actor):
    """Adds up what it gets."""

    receives: ClassVar[Any] = Rows | Listen | GetSum
    value = 0.0
    num_arrays = 0

    async def handle(self, message: Rows | Listen | GetSum) -> Done | Sum | None:
        match message:
            case Rows():
                self.value += float(message.values.numpy().sum())
                self.num_arrays += 1
            case Listen():
                return Done(address=await self.system.listen(f"ipc://@example-{self.system.node}"))
            case GetSum():
                return Sum(value=self.value, num_arrays=self.num_arrays)
        return None


async def main(num_arrays: int = 50) -> None:
    async with ActorSystem("source") as system:
        total = await system.spawn_process("actor_pipeline:Total", name="total")
        scale = await system.spawn_process("actor_pipeline:Scale", name="scale")
        where = await total.ask(Listen(), timeout=5)
        await scale.ask(Follow(address=where.address, name="total"), timeout=5)
        expected = 0.0
        for number in range(num_arrays):
            rows = np.full((256, 256), number, dtype=np.float32)
            expected += 2 * float(rows.sum())
            await scale.tell(Rows(values=Tensor.from_numpy(rows)))
        result = await total.ask(GetSum(), timeout=5)
        while result.num_arrays < num_arrays:
            print(f"{result.num_arrays} of {num_arrays} arrays have arrived")
            await asyncio.sleep(0.01)
            result = await total.ask(GetSum(), timeout=5)
        print(f"{result.num_arrays} arrays through three processes, sum {result.value:.0f}, expected {expected:.0f}")
        sys.exit(result.value != expected)


if __name__ == "__main__":
    asyncio.run(main())
