"""What cannot travel, and what must not get in."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import msgpack
import msgspec
import numpy as np
import pytest

from asyncpipe.actors.envelope import Envelope, EnvelopeKind, encode_envelope
from asyncpipe.errors import Invalid, Refused, WireError
from asyncpipe.ids import NodeId
from asyncpipe.wire.codec import Codec, encode
from asyncpipe.wire.fields import MAX_SEQUENCES_PER_STEP
from asyncpipe.wire.handshake import MAX_HELLO_BYTES, Hello, check_hello, decode_hello, decode_refusal, encode_hello
from asyncpipe.wire.messages import Cancel, Delta, Generate, GetStatus, Message, Sampling, Step, ToStage, Updates
from asyncpipe.wire.tensors import MAX_TENSOR_FRAMES, DType, Tensor, TensorRef, resolve


class Parcel(Message, frozen=True, kw_only=True):
    tensors: Annotated[tuple[Tensor, ...], msgspec.Meta(max_length=100)]


STEPS = Codec[Step](Step)
HIDDEN = Tensor.from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3))
STEP = Step(epoch=1, micro_batch=0, step=0, delta=Delta(), hidden=HIDDEN)


def step_with(hidden: Any, *frames: bytes) -> list[bytes]:
    """A Step whose `hidden` says anything at all."""
    return [msgpack.packb({**msgpack.unpackb(encode(STEP)[0]), "hidden": hidden}), *frames]


def test_a_tensor_is_neither_copied_on_the_way_out_nor_on_the_way_in() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    frames = encode(Step(epoch=1, micro_batch=0, step=0, delta=Delta(), hidden=Tensor.from_numpy(array)))
    decoded = STEPS.decode(frames).hidden
    assert decoded is not None
    array[1, 2] = 99.0
    assert decoded.numpy()[1, 2] == 99.0


@pytest.mark.parametrize(
    ("hidden", "frames"),
    [
        ([0, "float32", [2, 3]], []),  # its frame is missing
        ([0, "float32", [2, 3]], [bytes(23)]),
        ([0, "float32", [2, 3]], [bytes(25)]),
        ([1, "float32", [2, 3]], [bytes(24)]),
        ([64, "float32", [2, 3]], [bytes(24)]),
        ([-1, "float32", [2, 3]], [bytes(24)]),
        ([0, "complex64", [2, 3]], [bytes(48)]),
        ([0, "object", [2, 3]], [bytes(48)]),
        ([0, "float32", [-2, -3]], [bytes(24)]),
        ([0, "float32", [2**40] * 8], [bytes(24)]),
        ([0, "float32", [2**41, 0]], [b""]),
        ([0, "float32", [1] * 9], [bytes(4)]),
        ([0, "float32", 6], [bytes(24)]),
        ([0, "float32"], [bytes(24)]),
        ({"frame": 0}, [bytes(24)]),
        ("hidden", [bytes(24)]),
        (b"\x80\x04", [bytes(24)]),
    ],
)
def test_a_tensor_that_does_not_fit_its_frame_is_a_wire_error(hidden: Any, frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        STEPS.decode(step_with(hidden, *frames))


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("shape", [(), (0,), (0, 2**40), (1,), (2, 3)])
def test_every_dtype_and_shape_survives(dtype: DType, shape: tuple[int, ...]) -> None:
    num_bytes = TensorRef(0, dtype, shape).nbytes
    tensor = resolve(TensorRef(0, dtype, shape), [bytes(range(num_bytes))])
    assert tensor.nbytes == num_bytes
    if dtype is DType.BFLOAT16:
        with pytest.raises(Invalid, match="no bfloat16"):
            tensor.numpy()
    else:
        assert tensor.numpy().shape == shape


def test_an_array_that_is_not_contiguous_is_copied_and_one_that_cannot_travel_is_refused() -> None:
    tensor = Tensor.from_numpy(np.arange(6, dtype=np.int64).reshape(2, 3).T)
    assert tensor.numpy().tolist() == [[0, 3], [1, 4], [2, 5]]
    for array in (np.array(["x"]), np.array([object()]), np.zeros(2, np.complex64)):
        with pytest.raises(Invalid, match="cannot travel; use one of bool, uint8"):
            Tensor.from_numpy(array)


def test_too_many_tensors_or_a_foreign_object_cannot_be_sent() -> None:
    with pytest.raises(Invalid, match=f"more than {MAX_TENSOR_FRAMES} tensors"):
        encode(Parcel(tensors=(HIDDEN,) * (MAX_TENSOR_FRAMES + 1)))
    frames = encode(Parcel(tensors=(HIDDEN,) * MAX_TENSOR_FRAMES))
    assert len(Codec[Parcel](Parcel).decode(frames).tensors) == MAX_TENSOR_FRAMES
    with pytest.raises(Invalid, match="Cancel cannot be sent: a object cannot travel"):
        encode(Cancel(request_id=object()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "Cancel", "request_id": ""},
        {"type": "Cancel", "request_id": "x" * 129},
        {"type": "Cancel", "request_id": 5},
        {"type": "Cancel"},
        {"type": "GetStatus"},  # a message, but not of this union
        {"type": "no such message", "request_id": "r"},
        {"request_id": "r"},
        {"type": "Generate", "request_id": "r", "prompt_token_ids": [-1]},
        {"type": "Generate", "request_id": "r", "prompt_token_ids": [2**31]},
        {"type": "Generate", "request_id": "r", "sampling": {"temperature": -0.1}},
        {"type": "Generate", "request_id": "r", "sampling": {"top_p": 0.0}},
        {"type": "Generate", "request_id": "r", "sampling": {"stop": ["x"] * 17}},
        {"type": "Generate", "request_id": "r", "sampling": {"max_new_tokens": 0}},
        {"type": "Generate", "request_id": "r", "sampling": {"temperature": float("nan")}},
        {"type": "Generate", "request_id": "r", "sampling": {"min_p": 1.1}},
        {"type": "Generate", "request_id": "r", "sampling": {"repetition_penalty": 0.0}},
        {"type": "Generate", "request_id": "r", "sampling": {"presence_penalty": -2.1}},
        {"type": "Generate", "request_id": "r", "sampling": {"frequency_penalty": 2.1}},
        {"type": "Generate", "request_id": "r", "sampling": {"logit_bias": {-1: 0.0}}},
        {"type": "Generate", "request_id": "r", "sampling": {"logit_bias": {"1": 0.0}}},
        {"type": "Generate", "request_id": "r", "sampling": {"logit_bias": {1: -100.1}}},
        {"type": "Generate", "request_id": "r", "sampling": {"logit_bias": dict.fromkeys(range(1025), 0.0)}},
        {"type": "Generate", "request_id": "r", "sampling": {"n": 0}},
        {"type": "Generate", "request_id": "r", "sampling": {"n": 65}},
        {"type": "Generate", "request_id": "r", "sampling": {"stop": [""]}},
        {"type": "Generate", "request_id": "r", "sampling": {"stop_token_ids": [0] * 257}},
        {"type": "Generate", "request_id": "r", "sampling": {"logprobs": 21}},
        {"type": "Generate", "request_id": "r", "sampling": {"prompt_logprobs": -1}},
        {"type": "Generate", "request_id": "r", "priority": 1001},
        [],
        None,
        b"bytes",
    ],
)
def test_what_breaks_a_bound_is_a_wire_error(fields: Any) -> None:
    with pytest.raises(WireError):
        Codec[Message](Generate | Cancel).decode([msgpack.packb(fields)])


@pytest.mark.parametrize(
    "delta",
    [
        [],  # a map, not an array
        {"left": [-1]},
        {"parted": [2**53 + 1]},
        {"adopted": [0] * (MAX_SEQUENCES_PER_STEP + 1)},
        {"token_ids": [0] * (MAX_SEQUENCES_PER_STEP + 1)},
        {"token_ids": [2**31]},
        {"opened": [[9, [1, 2]]]},  # without num_prompt
        {"opened": [{"sequence": 9, "token_ids": [1, 2], "num_prompt": 2}]},
        {"opened": [[9, [1, 2], 2, {"top_p": 0.0}]]},
        {"chunks": [[9, 0]]},
        {"chunks": [[9]]},
        {"padding": -1},
    ],
)
def test_a_delta_that_breaks_a_bound_is_a_wire_error(delta: Any) -> None:
    fields = {"type": "Step", "epoch": 1, "micro_batch": 0, "step": 0}
    codec = Codec[Message](ToStage)
    assert codec.decode([msgpack.packb({**fields, "delta": {}})]) == Step(epoch=1, micro_batch=0, step=0, delta=Delta())
    with pytest.raises(WireError):
        codec.decode([msgpack.packb({**fields, "delta": delta})])


@pytest.mark.parametrize(
    "updates",
    [
        [],
        [{"type": "Cancel", "request_id": "r"}],  # a message, but not an update
        [{"type": "Updates", "updates": []}],
        [{"request_id": "r", "index": 0, "token_id": 0, "text": ""}],
        [{"type": "Piece", "request_id": "r", "index": 0, "token_id": 0, "text": "", "logprobs": [0, 0.0]}],
        [{"type": "Piece", "request_id": "r", "index": 0, "token_id": 0, "text": ""}] * (2 * MAX_SEQUENCES_PER_STEP + 1),
    ],
)
def test_updates_that_break_a_bound_are_a_wire_error(updates: list[Any]) -> None:
    with pytest.raises(WireError):
        Codec[Message](Updates).decode([msgpack.packb({"type": "Updates", "updates": updates})])


def decode_step_len(num_sequences: int) -> int:
    """Bytes of a step in which nobody comes or goes, in the worst case of every number, with its envelope."""
    delta = Delta(token_ids=(2**31 - 1,) * num_sequences)
    step = Step(epoch=2**53, micro_batch=2**53, step=2**53, delta=delta)
    envelope = encode_envelope(Envelope(EnvelopeKind.TELL, "stage", "coordinator"))
    return len(envelope) + sum(map(len, encode(step)))


def test_a_steady_decode_step_takes_less_than_200_bytes_and_5_more_a_sequence() -> None:
    lens = [decode_step_len(num_sequences) for num_sequences in range(MAX_SEQUENCES_PER_STEP + 1)]
    assert all(num_bytes < 200 + 5 * num_sequences for num_sequences, num_bytes in enumerate(lens))
    growth = [after - before for before, after in itertools.pairwise(lens)]
    del growth[15], growth[0]  # there the list gets a longer header, or appears at all
    assert max(growth) <= 5


def test_bounds_hold_and_defaults_do_not_travel() -> None:
    message = Generate(request_id="r" * 128, prompt="p", sampling=Sampling())
    assert Codec[Message](Generate | Cancel).decode(encode(message)) == message
    assert b"deadline_s" not in bytes(encode(message)[0])


def test_unknown_fields_of_a_newer_minor_version_are_ignored() -> None:
    assert Codec[Message](GetStatus | Cancel).decode([msgpack.packb({"type": "GetStatus", "new": 1})]) == GetStatus()
    hello = encode_hello(Hello(node=NodeId("n"), role="worker"))
    newer = msgpack.packb({**msgpack.unpackb(hello), "minor": 7, "news": [1, 2]})
    assert decode_hello(newer).minor == 7


def test_deep_nesting_and_no_frames_are_wire_errors() -> None:
    deep = b"\x91" * 100_000 + b"\xc0"
    for frames in ([], [deep], [b""], [b"\x82\xa4type\xa6Cancel\xaarequest_id" + deep]):
        with pytest.raises(WireError):
            Codec[Message](Cancel).decode(frames)
    with pytest.raises(WireError):
        decode_hello(deep[:MAX_HELLO_BYTES])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"magic": "http"}, "not an asyncpipe Hello"),
        ({"node": ""}, "not an asyncpipe Hello"),
        ({"node": "x" * 129}, r"Hello\.node must be text of at most 128 characters"),
        ({"role": 5}, r"Hello\.role must be text"),
        ({"window": 0}, r"Hello\.window must be a number from 1"),
        ({"window": True}, r"Hello\.window must be a number"),
        ({"max_frame_bytes": 2**51}, r"Hello\.max_frame_bytes must be a number"),
        ({"padding": "x" * MAX_HELLO_BYTES}, "a Hello of [0-9]+ bytes; at most 4096"),
    ],
)
def test_a_hello_out_of_bounds_is_a_wire_error(change: dict[str, Any], complaint: str) -> None:
    fields = {**msgpack.unpackb(encode_hello(Hello(node=NodeId("n"), role="worker"))), **change}
    with pytest.raises(WireError, match=complaint):
        decode_hello(msgpack.packb(fields))


def test_a_hello_is_judged_by_major_version_and_token() -> None:
    hello = Hello(node=NodeId("n"), role="worker", token="right")
    check_hello(hello, token="right")
    check_hello(hello, token="")
    with pytest.raises(Refused, match="wrong or missing token"):
        check_hello(hello, token="é")
    with pytest.raises(Refused, match=r"protocol 2\.0 is not spoken here"):
        check_hello(Hello(node=NodeId("n"), role="worker", major=2), token="")


def test_a_refusal_without_a_reason_still_reads_as_one() -> None:
    assert decode_refusal(msgpack.packb({"magic": "asyncpipe"})) == "no reason given"
