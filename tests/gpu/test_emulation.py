"""The emulated card finds what it is there to find."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.emulated_cuda import Hazard, Machine, emulated_cuda
from tests.gpu.conftest import OWN_KERNELS

pytestmark = OWN_KERNELS
CARD = torch.device("cuda", 0)


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Its hazards are the test's to look at."""
    with emulated_cuda(num_cards=2) as machine:
        yield machine
        machine.hazards.clear()


def pinned(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, pin_memory=True)


@pytest.mark.usefixtures("machine")
def test_work_of_one_stream_is_in_order_and_numbers_are_right() -> None:
    x = torch.arange(6, device=CARD).view(2, 3).float()
    assert x.device == CARD and x.is_cuda
    y = (x @ x.t()).softmax(-1)
    y[0] += 1
    expected = torch.arange(6).view(2, 3).float()
    expected = (expected @ expected.t()).softmax(-1)
    expected[0] += 1
    assert torch.equal(y.cpu(), expected)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("waits", [True, False])
def test_a_stream_that_does_not_wait_for_another_is_found(waits: bool) -> None:
    x, side = torch.zeros(4, device=CARD), torch.cuda.Stream(CARD)
    x += 1
    if waits:
        side.wait_stream(torch.cuda.current_stream(CARD))
    with torch.cuda.stream(side):
        if waits:
            x *= 2
            return
        with pytest.raises(Hazard, match="aten::mul_ on stream 3 did not wait for aten::add_ on stream 1"):
            x *= 2


@pytest.mark.usefixtures("machine")
def test_streams_may_work_on_different_parts_of_a_tensor() -> None:
    x, side = torch.zeros(4, device=CARD), torch.cuda.Stream(CARD)
    side.wait_stream(torch.cuda.current_stream(CARD))
    with torch.cuda.stream(side):
        x[2:] += 1
    x[:2] += 1
    with pytest.raises(Hazard):
        x[1:3] += 1
    torch.cuda.current_stream(CARD).wait_stream(side)
    x[1:3] += 1


@pytest.mark.parametrize("is_told", [True, False])
def test_memory_that_is_freed_while_another_stream_uses_it_is_found(is_told: bool, machine: Machine) -> None:
    x, side = torch.ones(4, device=CARD), torch.cuda.Stream(CARD)
    side.wait_stream(torch.cuda.current_stream(CARD))
    with torch.cuda.stream(side):
        y = x + 1
    if is_told:
        x.record_stream(side)
    del x
    assert [str(hazard) for hazard in machine.hazards] == (
        [] if is_told else ["memory was freed while aten::add on stream 3 may use it, without record_stream"]
    )
    side.synchronize()
    assert y.tolist() == [2.0] * 4


@pytest.mark.usefixtures("machine")
def test_page_locked_memory_that_is_read_too_early_holds_nothing() -> None:
    target = pinned(0, 0, 0)
    target.copy_(torch.tensor([1, 2, 3]).to(CARD), non_blocking=True)
    copied = torch.cuda.current_stream(CARD).record_event()
    assert target.tolist() != [1, 2, 3]
    copied.synchronize()
    assert target.tolist() == [1, 2, 3]


@pytest.mark.usefixtures("machine")
def test_page_locked_memory_that_is_used_again_too_early_is_found() -> None:
    source = pinned(1, 2, 3)
    x = source.to(CARD, non_blocking=True)
    source[0] = 5
    with pytest.raises(Hazard, match="was changed while it was copied"):
        x + 1


def test_waits_of_the_host_are_counted(machine: Machine) -> None:
    x = pinned(3, 1, 2).to(CARD, non_blocking=True)
    y = x.sort().values + 1
    assert machine.waits == []
    assert y.tolist() == [2, 3, 4]
    x[x > 1]
    torch.tensor([1, 2]).to(CARD)
    assert machine.waits == ["a copy to the host", "aten::index", "a copy to the card"]


@pytest.mark.usefixtures("machine")
def test_tensors_of_two_devices_do_not_meet() -> None:
    x, there, host = torch.ones(3, device=CARD), torch.ones(3, device="cuda:1"), torch.ones(3)
    for other in (there, host):
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            x + other
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()


def test_cards_that_are_touched_are_known(machine: Machine) -> None:
    torch.ones(3, device="cuda:1")
    assert machine.contexts == {1}
    torch.cuda.current_stream().record_event()  # of the first one: nobody has said otherwise
    assert machine.contexts == {0, 1}


@pytest.mark.usefixtures("machine")
def test_a_graph_is_computed_when_it_is_replayed() -> None:
    x, total = torch.zeros(3, device=CARD), torch.zeros(3, device=CARD)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2 + 1
        total += y
    assert total.tolist() == [0, 0, 0]
    for number in (1, 5):
        x.fill_(number)
        graph.replay()
        assert y.tolist() == [2 * number + 1] * 3
    assert total.tolist() == [14] * 3


@pytest.mark.usefixtures("machine")
def test_what_a_graph_cannot_hold_is_refused() -> None:
    x = torch.zeros(3, device=CARD)
    for step in (x.tolist, x.nonzero, lambda: torch.zeros(3).to(CARD), torch.cuda.Event().synchronize):
        with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            step()
