"""What holds for every actor, in this process or across a link."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from asyncpipe.actors import Actor, ActorRef, ActorSystem, RestartPolicy, TensorPort
from asyncpipe.errors import Broken, Busy, Closed, Invalid, Refused, RemoteError, Timeout
from asyncpipe.testing import FakeClock
from asyncpipe.transport.base import LinkOptions
from asyncpipe.wire.messages import Request
from asyncpipe.wire.tensors import Tensor
from tests.contract.actors_under_test import Echo, Echoed, Fail, GetNotes, Later, Note, Recorder, Slow
from tests.support import run, until

OPTIONS = LinkOptions(window=4)
SCHEMES = ["local", "memory", "ipc", "tcp"]


def an_address(scheme: str) -> str:
    name = secrets.token_hex(6)
    return {"memory": f"memory://{name}", "ipc": f"ipc://@{name}", "tcp": "tcp://127.0.0.1:0"}[scheme]


@asynccontextmanager
async def recorder(scheme: str) -> AsyncIterator[tuple[ActorRef, Recorder, ActorSystem]]:
    """A reference to a recorder, the recorder, and the system that the reference is used in."""
    actor = Recorder()
    async with ActorSystem("here", options=OPTIONS) as here:
        if scheme == "local":
            yield here.spawn(lambda: actor, name="recorder"), actor, here
            return
        async with ActorSystem("there", options=OPTIONS) as there:
            there.spawn(lambda: actor, name="recorder", restart=RestartPolicy.never())
            address = await there.listen(an_address(scheme))
            yield await here.connect(address, actor="recorder"), actor, here


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_ask_is_answered_and_tells_arrive_in_order(scheme: str) -> None:
    async def scenario() -> None:
        async with recorder(scheme) as (ref, _, _):
            assert (await ref.ask(Echo(value=7), timeout=2)).value == 7
            for value in range(50):
                await ref.tell(Note(value=value), timeout=2)
            while len(notes := (await ref.ask(GetNotes(), timeout=2)).values) < 50:
                await asyncio.sleep(0.001)
            assert notes == tuple(range(50))

    run(scenario())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_errors_travel_as_data(scheme: str) -> None:
    async def scenario() -> None:
        async with recorder(scheme) as (ref, _, _):
            with pytest.raises(Busy, match="not now") as refused:
                await ref.ask(Fail(how="busy"), timeout=2)
            assert refused.value.retry_after_s == 1.5
            assert (await ref.ask(Echo(value=1), timeout=2)).value == 1, "an error of ours is no crash"
            with pytest.raises(RemoteError, match="ZeroDivisionError: oh no"):
                await ref.ask(Fail(how="crash"), timeout=2)

    run(scenario())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_answer_may_come_later_than_the_next(scheme: str) -> None:
    async def scenario() -> None:
        async with recorder(scheme) as (ref, _, _):
            order: list[str] = []

            async def ask(name: str, message: Request[Echoed]) -> None:
                await ref.ask(message, timeout=5)
                order.append(name)

            await asyncio.gather(ask("later", Later(seconds=0.2)), ask("next", Echo(value=1)))
            assert order == ["next", "later"]
            with pytest.raises(Busy, match="still not"):
                await ref.ask(Later(seconds=0.01, fails=True), timeout=5)
            assert (await ref.ask(Echo(value=3), timeout=2)).value == 3

    run(scenario())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_answers_that_are_to_come_end_with_their_actor(scheme: str) -> None:
    async def scenario() -> None:
        async with recorder(scheme) as (ref, actor, _):
            asked = asyncio.ensure_future(ref.ask(Later(seconds=60), timeout=60))
            await ref.ask(Echo(value=1), timeout=2)
            await actor.system.stop(actor.ref)
            with pytest.raises(Closed, match="recorder has stopped"):
                await asked

    run(scenario())


class Leaver(Actor):
    """Stops before what is to answer has begun."""

    async def handle(self, message: str) -> asyncio.Future[str]:
        answer = self.answer_later(asyncio.sleep(60, "never"), name="later")
        self.system.cell(self.ref.name).request_stop()
        return answer


def test_an_answer_that_has_not_been_begun_ends_with_its_actor_too() -> None:
    async def scenario() -> None:
        async with ActorSystem("here") as here:
            ref = here.spawn(Leaver, name="leaver")
            with pytest.raises(Closed, match="leaver has stopped"):
                await ref.ask("anything", timeout=5)  # type: ignore[arg-type]

    run(scenario())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_ask_that_is_not_answered_says_what_whom_and_how_long(scheme: str) -> None:
    async def scenario() -> None:
        async with recorder(scheme) as (ref, _, _):
            with pytest.raises(Timeout, match=r"actor recorder did not answer Slow within 0\.05 s"):
                await ref.ask(Slow(seconds=0.2), timeout=0.05)

    run(scenario())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_full_mailbox_holds_tells_back_and_control_passes(scheme: str) -> None:
    async def scenario() -> None:
        async with recorder(scheme) as (ref, actor, _):
            actor.gate.clear()
            accepted = 0
            with pytest.raises(Timeout):
                for value in range(100):
                    await ref.tell(Note(value=value), timeout=0.1)
                    accepted += 1
            assert accepted <= 10, "mailbox 4, window 4, one in hand"
            with pytest.raises(Busy):
                ref.tell_nowait(Note(value=-1))
            ref.signal(Note(value=1000))
            await asyncio.sleep(0.05)  # for the signal to arrive behind the data
            actor.gate.set()
            await until(lambda: len(actor.notes) == accepted + 1)
            assert actor.notes.index(1000) == 1, "the control lane is read before data that came first"
            assert actor.notes[0] == 0
            assert sorted(actor.notes) == [*range(accepted), 1000]

    run(scenario())


@pytest.mark.parametrize("scheme", ["memory", "ipc", "tcp"])
def test_one_busy_actor_does_not_hold_up_another_behind_the_same_link(scheme: str) -> None:
    async def scenario() -> None:
        busy, free = Recorder(), Recorder()
        async with ActorSystem("there") as there, ActorSystem("here") as here:
            there.spawn(lambda: busy, name="busy")
            there.spawn(lambda: free, name="free")
            address = await there.listen(an_address(scheme))
            busy.gate.clear()
            to_busy = await here.connect(address, actor="busy")
            to_free = await here.connect(address, actor="free")
            for value in range(8):
                await to_busy.tell(Note(value=value), timeout=1)
            assert (await to_free.ask(Echo(value=5), timeout=1)).value == 5
            busy.gate.set()

    run(scenario())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_watchers_hear_once_of_a_stop_and_of_a_crash(scheme: str) -> None:
    async def scenario() -> None:
        async with recorder(scheme) as (ref, actor, here):
            watcher = Recorder()
            here.monitor(ref, watcher=here.spawn(lambda: watcher, name="watcher"))
            await asyncio.sleep(0.05)
            ref.signal(Fail(how="crash"))
            await until(lambda: bool(watcher.downs))
            assert watcher.downs[0].ref == ref
            assert "oh no" in watcher.downs[0].error.message
            assert actor.was_stopped
            await asyncio.sleep(0.05)
            assert len(watcher.downs) == 1

    run(scenario())


@pytest.mark.parametrize("scheme", ["memory", "ipc", "tcp"])
def test_a_lost_system_breaks_asks_and_is_told_to_watchers(scheme: str) -> None:
    async def scenario() -> None:
        watcher = Recorder()
        async with ActorSystem("here") as here:
            async with ActorSystem("there") as there:
                there.spawn(Recorder, name="recorder")
                ref = await here.connect(await there.listen(an_address(scheme)), actor="recorder")
                here.monitor(ref, watcher=here.spawn(lambda: watcher, name="watcher"))
                ask = asyncio.ensure_future(ref.ask(Slow(seconds=30), timeout=20))
                await asyncio.sleep(0.05)
                recorder_ref = there.cell(ref.name).ref
                await there.stop(recorder_ref, timeout=0.05)
            with pytest.raises((Closed, Broken)):
                await ask
            await until(lambda: bool(watcher.downs))
            await until(lambda: not here.statistics().links)
            with pytest.raises(Broken):
                await ref.tell(Note(value=1), timeout=1)

    run(scenario())


@pytest.mark.parametrize("scheme", ["memory", "ipc", "tcp"])
def test_an_unknown_actor_and_an_unknown_message_are_refused(scheme: str) -> None:
    async def scenario() -> None:
        async with recorder(scheme) as (ref, _, _):
            with pytest.raises(Refused, match="no actor named 'nobody'"):
                await type(ref)("nobody", ref.route).ask(Echo(value=1), timeout=2)  # type: ignore[arg-type]
            with pytest.raises(Invalid, match="is told, not asked"):
                await ref.ask(Note(value=1), timeout=2)  # type: ignore[arg-type]

    run(scenario())


def test_a_crashed_actor_starts_again_until_its_intensity_is_reached() -> None:
    async def scenario() -> None:
        clock, instances = FakeClock(), []

        def factory() -> Recorder:
            instances.append(Recorder())
            return instances[-1]

        policy = RestartPolicy(max_restarts=2, period_s=10.0, backoff_s=1.0, max_backoff_s=8.0)
        async with ActorSystem("test", clock=clock, sleep=clock.sleep) as system:
            watcher = Recorder()
            ref = system.spawn(factory, name="fragile", restart=policy)
            system.monitor(ref, watcher=system.spawn(lambda: watcher, name="watcher"))
            for backoff_s in (1.0, 2.0):
                await ref.tell(Fail(how="crash"))
                await until(lambda: clock.num_sleepers == 1)
                await clock.advance(backoff_s - 0.1)
                assert clock.num_sleepers == 1, "the backoff doubles"
                await clock.advance(0.2)
                assert (await ref.ask(Echo(value=3), timeout=1)).value == 3
            assert len(instances) == 3
            await clock.advance(20.0)  # the crashes so far are forgotten
            await ref.tell(Fail(how="crash"))
            await until(lambda: clock.num_sleepers == 1)
            await clock.advance(1.1)
            assert not watcher.downs
            await ref.tell(Fail(how="crash"))
            await until(lambda: clock.num_sleepers == 1)
            await clock.advance(2.1)
            await ref.tell(Fail(how="crash"))
            await until(lambda: bool(watcher.downs))
            with pytest.raises(Refused):
                await ref.tell(Note(value=1))

    run(scenario())


def test_an_escalated_crash_ends_the_system() -> None:
    async def scenario() -> None:
        async with ActorSystem("test") as system:
            ref = system.spawn(Recorder, name="vital", restart=RestartPolicy(escalate=True))
            await ref.tell(Fail(how="crash"))
            await asyncio.sleep(30)

    with pytest.raises(ZeroDivisionError, match="oh no"):
        run(scenario())


def test_leaving_the_block_stops_actors_even_one_that_hangs() -> None:
    async def scenario() -> Recorder:
        actor = Recorder()
        async with ActorSystem("test") as system:
            ref = system.spawn(lambda: actor, name="recorder")
            actor.gate.clear()
            await ref.tell(Note(value=1))
            await asyncio.sleep(0.01)
            await system.stop(ref, timeout=0.05)
        return actor

    assert run(scenario()).was_stopped


def test_the_error_of_the_block_is_raised_as_it_is() -> None:
    async def scenario() -> None:
        async with ActorSystem("test") as system:
            system.spawn(Recorder, name="recorder")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(scenario())


def test_statistics_show_every_mailbox_and_link() -> None:
    async def scenario() -> None:
        async with recorder("ipc") as (ref, _, here):
            await ref.ask(Echo(value=1), timeout=1)
            (link,) = here.statistics().links.values()
            assert (link.sent_messages, link.received_messages) == (1, 1)
        async with recorder("local") as (ref, actor, here):
            actor.gate.clear()
            for value in range(3):
                await ref.tell(Note(value=value))
            await asyncio.sleep(0)
            mailbox = here.statistics().mailboxes["recorder"]
            assert (mailbox.capacity, mailbox.high_water_mark) == (4, 3)
            actor.gate.set()

    run(scenario())


@pytest.mark.parametrize("scheme", ["memory", "ipc", "tcp"])
def test_tensors_match_their_tags_in_any_order(scheme: str) -> None:
    async def scenario() -> None:
        async with ActorSystem("a") as a, ActorSystem("b") as b:
            left, right = await connected_ports(a, b, scheme)
            wanted = {tag: right.recv(tag) for tag in (3, 1, 2)}
            for tag in (1, 2, 3, 4):
                await left.send(tag, Tensor.from_numpy(np.full((tag, 50_000), tag, np.float32)))
            for tag, future in wanted.items():
                assert (await future).numpy().tolist()[0][:2] == [tag, tag]
            assert (await right.recv(4)).shape == (4, 50_000)

    run(scenario())


def test_a_tensor_that_does_not_come_and_a_lost_peer_are_errors() -> None:
    async def scenario() -> None:
        async with ActorSystem("a") as a:
            async with ActorSystem("b") as b:
                left, right = await connected_ports(a, b, "ipc", timeout_s=0.1)
                with pytest.raises(Timeout, match=r"tensor 9 did not come .* within 0\.1 s"):
                    await right.recv(9)
                right._timeout_s = left._timeout_s = 10.0
                waiting = left.recv(5)
            with pytest.raises((Broken, Closed)):
                await waiting

    run(scenario())


def test_unclaimed_tensors_hold_the_sender_back() -> None:
    async def scenario() -> None:
        async with ActorSystem("a", options=OPTIONS) as a, ActorSystem("b", options=OPTIONS) as b:
            left, right = await connected_ports(a, b, "ipc", max_unclaimed=2)
            tensor = Tensor.from_numpy(np.zeros(4, np.float32))
            sends = [left.send(tag, tensor) for tag in range(20)]
            await asyncio.sleep(0.1)
            assert sum(send.done() for send in sends) < 12
            for tag in range(20):
                await right.recv(tag)
            await asyncio.gather(*sends)

    run(scenario())


async def connected_ports(
    a: ActorSystem, b: ActorSystem, scheme: str, *, timeout_s: float = 5.0, max_unclaimed: int = 64
) -> tuple[TensorPort, TensorPort]:
    left = TensorPort(timeout_s=timeout_s, max_unclaimed=max_unclaimed)
    right = TensorPort(timeout_s=timeout_s, max_unclaimed=max_unclaimed)
    a.spawn(lambda: left, name="port")
    b.spawn(lambda: right, name="port")
    await asyncio.sleep(0)
    left.connect(await a.connect(await b.listen(an_address(scheme)), actor="port"))
    right.connect(await b.connect(await a.listen(an_address(scheme)), actor="port"))
    return left, right
