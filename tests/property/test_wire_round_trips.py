"""Whatever a message may hold comes back as it was, and nothing that arrives can do more than raise WireError."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncpipe.errors import ErrorCode, ErrorData, WireError
from asyncpipe.ids import NodeId
from asyncpipe.policy import Compression, Placement, Policy
from asyncpipe.wire import messages
from asyncpipe.wire.codec import Codec, encode
from asyncpipe.wire.handshake import (
    Hello,
    decode_hello,
    decode_refusal,
    encode_hello,
    encode_refusal,
)
from asyncpipe.wire.messages import Message, Request
from asyncpipe.wire.tensors import Buffer, DType, Tensor

MESSAGE_TYPES = sorted(
    (
        found
        for found in vars(messages).values()
        if isinstance(found, type) and issubclass(found, Message) and found not in (Message, Request)
    ),
    key=lambda found: found.__name__,
)

# --- strategies, from the annotations themselves ----------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DType))
    shape = draw(st.lists(st.integers(0, 4), max_size=4).map(tuple))
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return Tensor(dtype, shape, memoryview(draw(st.binary(min_size=num_bytes, max_size=num_bytes))))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    percents = {}
    for what in ("w", "cache", "act"):
        percents[f"{what}_gpu_percent"] = device = draw(st.floats(0, 100))
        percents[f"{what}_cpu_percent"] = draw(st.floats(0, 100 - device))
    flags = {name: draw(st.booleans()) for name in ("overlap", "sep_layer", "compress_weight", "cpu_cache_compute")}
    batches = {name: draw(st.integers(1, 64)) for name in ("gpu_batch_size", "num_gpu_batches")}
    group_size = 2 * draw(st.integers(1, 2048))
    return Policy(
        **batches,
        **percents,
        **flags,
        attn_sparsity=draw(st.floats(0, 1, exclude_min=True)),
        comp_weight_config=Compression(group_size=group_size),
        placement=draw(st.sampled_from(Placement)),
    )


def values_of(kind: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    """Values within the bounds that the type declares, sizes cut to what a test can afford."""
    match kind:
        case msgspec.inspect.StructType():
            return structs_of(kind.cls)
        case msgspec.inspect.IntType():
            low, high = kind.ge if kind.ge is not None else -(2**63), kind.le if kind.le is not None else 2**63 - 1
            return st.integers(low, kind.lt - 1 if kind.lt is not None else high)
        case msgspec.inspect.FloatType():
            minimum = kind.ge if kind.gt is None else kind.gt
            return st.floats(minimum, kind.le, exclude_min=kind.gt is not None, allow_nan=False)
        case msgspec.inspect.StrType():
            return st.text(min_size=kind.min_length or 0, max_size=min(kind.max_length or 20, 20))
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.EnumType():
            return st.sampled_from(list(kind.cls))
        case msgspec.inspect.VarTupleType():
            max_size = min(kind.max_length or 4, 4)
            return st.lists(values_of(kind.item_type), min_size=kind.min_length or 0, max_size=max_size).map(tuple)
        case msgspec.inspect.DictType():
            return st.dictionaries(values_of(kind.key_type), values_of(kind.value_type), max_size=min(kind.max_length or 4, 4))
        case msgspec.inspect.NamedTupleType():
            return st.builds(kind.cls, **{field.name: values_of(field.type) for field in kind.fields})
        case msgspec.inspect.TupleType():
            return st.tuples(*map(values_of, kind.item_types))
        case msgspec.inspect.UnionType():
            return st.one_of(*map(values_of, kind.types))
        case msgspec.inspect.CustomType():
            return tensors()
        case msgspec.inspect.DataclassType(cls=cls) if cls is Policy:
            return policies()
    raise AssertionError(f"no strategy for {kind}")


def structs_of(struct: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    return st.builds(struct, **{field.name: values_of(field.type) for field in info.fields})


def plain(value: Any) -> Any:
    """Tensors compare by identity; this compares by what they hold."""
    if isinstance(value, Tensor):
        return ("tensor", value.dtype, value.shape, bytes(value.data))
    if isinstance(value, msgspec.Struct):
        return (type(value), [plain(getattr(value, name)) for name in value.__struct_fields__])
    return (type(value), [plain(item) for item in value]) if isinstance(value, tuple) else value


@pytest.mark.parametrize("message_type", MESSAGE_TYPES, ids=lambda found: found.__name__)
def test_every_message_comes_back_as_it_was(message_type: type[Message]) -> None:
    codec = Codec[Message](message_type)

    @settings(max_examples=40, deadline=None, database=None, derandomize=True)
    @given(structs_of(message_type))
    def check(message: Message) -> None:
        frames = [bytes(frame) for frame in encode(message)]
        assert plain(codec.decode(frames)) == plain(message)

    check()


@settings(max_examples=200, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    node=st.text(min_size=1, max_size=128),
    role=st.text(max_size=128),
    token=st.text(max_size=128),
    window=st.integers(1, 1 << 20),
    max_frame_bytes=st.integers(1, 1 << 50),
    major=st.integers(0, 1 << 16),
    minor=st.integers(0, 1 << 16),
    shm=st.text(max_size=128),
)
def test_every_hello_comes_back_as_it_was(**fields: Any) -> None:
    assert decode_hello(encode_hello(Hello(**fields))) == Hello(**fields)


@given(st.text(max_size=2000))
def test_a_refusal_comes_back_cut_to_its_limit(reason: str) -> None:
    assert decode_refusal(encode_refusal(reason)) == reason[:1024]


# --- 100,000 mutations ------------------------------------------------------------------------------------------------

LOGPROBS = messages.TokenLogprobs(17, -0.5, 2, (messages.Alternative(4, -0.25), messages.Alternative(17, -0.5)))
TIMINGS = (messages.StageTiming(0, 900), messages.StageTiming(70_000, 2**40))
SAMPLING = messages.Sampling(
    temperature=0.7, top_p=0.9, repetition_penalty=1.1, logit_bias={5: -100.0, 70_000: 2.5}, seed=7, n=2, stop=("\n\n", "é")
)
FAILED = messages.Failed(request_id="req-1", error=ErrorData(ErrorCode.BUSY, "full", 1.0))

SAMPLES: list[Message] = [
    messages.Generate(request_id="req-1", prompt="Once upon a ☃", sampling=SAMPLING, priority=-5),
    messages.Generate(request_id="req-2", prompt_token_ids=tuple(range(300)), deadline_s=2.5),
    messages.Cancel(request_id="req-1"),
    messages.Join(slot=1, pid=4242, host="localhost", device="cpu", address="ipc://@x"),
    messages.Tokens(epoch=1, micro_batch=2, step=3, token_ids=(1, 70_000, 2**31 - 1)),
    messages.Tokens(
        epoch=1,
        micro_batch=2,
        step=4,
        token_ids=(17, 4),
        timings=TIMINGS,
        logprobs=(LOGPROBS, None),
        prompt_logprobs=(messages.PromptLogprobs(9, (LOGPROBS,)),),
    ),
    messages.StageFailed(epoch=1, stage=0, error=ErrorData(ErrorCode.REMOTE, "ValueError: no", 0.5)),
    messages.Step(epoch=1, micro_batch=0, step=2**40, delta=messages.Delta(token_ids=(5, 6, 7))),
    messages.Step(
        epoch=1,
        micro_batch=0,
        step=2**40,
        delta=messages.Delta(
            left=(1, 2),
            parted=(3,),
            adopted=(4,),
            token_ids=(5, 6, 7),
            opened=(messages.Opened(9, (1, 2, 3), 2, SAMPLING),),
            chunks=(messages.Chunk(9, 3),),
            padding=1,
        ),
        timings=TIMINGS,
        hidden=Tensor.from_numpy(np.arange(24, dtype=np.float32).reshape(4, 6)),
    ),
    messages.Updates(
        updates=(
            messages.PromptScored(request_id="req-1", logprobs=(LOGPROBS,)),
            messages.Piece(request_id="req-1", index=3, token_id=17, text="🙂", choice=1, logprobs=LOGPROBS),
            messages.Finished(
                request_id="req-2",
                finish_reason=messages.FinishReason.STOP,
                text="",
                usage=messages.Usage(prompt_tokens=300, completion_tokens=7),
            ),
            FAILED,
        )
    ),
    messages.Updates(updates=(FAILED,)),
    messages.Spans(first=8, num_lost=2, spans=(messages.Span(1, 2, 3, -4, 5, 6), messages.Span(2, 0, 2**40, 2**60, 9, 1))),
]
ANY_MESSAGE = messages.ClientToCoordinator | messages.Updates | messages.WorkerToCoordinator | messages.ToStage | messages.Spans
HELLOS = [
    encode_hello(Hello(node=NodeId("n" * 16), role="worker", token="secret", shm="1:2:abc")),
    encode_hello(Hello(node=NodeId("é"), role="")),
]


def flip_bits(rng: random.Random, data: bytes, _: list[bytes]) -> bytes:
    mutated = bytearray(data)
    for _turn in range(rng.choice((1, 1, 2, 8))):
        mutated[rng.randrange(len(mutated))] ^= 1 << rng.randrange(8)
    return bytes(mutated)


def truncate(rng: random.Random, data: bytes, _: list[bytes]) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(rng: random.Random, data: bytes, _: list[bytes]) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice((1, 1, 2, 9))) + data[place:]


def splice(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def overwrite(rng: random.Random, data: bytes, _: list[bytes]) -> bytes:
    """With the bytes that announce huge arrays, maps, strings and extensions."""
    mutated = bytearray(data)
    place = rng.randrange(len(mutated))
    mutated[place : place + 5] = bytes([rng.choice((0xDD, 0xDF, 0xDB, 0xC6, 0xC9, 0xD9, 0xC1))]) + b"\xff" * 4
    return bytes(mutated)


MUTATIONS: list[Callable[[random.Random, bytes, list[bytes]], bytes]] = [flip_bits, truncate, insert, splice, overwrite]


def test_70_000_mutated_messages_are_valid_or_wire_errors() -> None:
    rng = random.Random(20_240_601)
    codec = Codec[Message](ANY_MESSAGE)
    originals = [[bytes(frame) for frame in encode(message)] for message in SAMPLES]
    bodies = [frames[0] for frames in originals]
    num_valid = 0
    for count in range(70_000):
        body, *tensor_frames = originals[count % len(originals)]
        mutated = rng.choice(MUTATIONS)(rng, body, bodies)
        frames: list[Buffer] = [mutated, *tensor_frames[: rng.choice((0, 1, 1, 1))]]
        num_valid += is_valid(partial(codec.decode, frames))
    assert 1_000 < num_valid < 35_000  # mutations that all fail, or all pass, would prove little


def test_30_000_mutated_hellos_are_valid_or_wire_errors() -> None:
    rng = random.Random(7)
    mutants = (rng.choice(MUTATIONS)(rng, HELLOS[count % 2], HELLOS) for count in range(30_000))
    outcomes = [is_valid(partial(decode_hello, mutant)) for mutant in mutants]
    assert 1_000 < sum(outcomes) < 20_000


def is_valid(decode: Callable[[], object]) -> bool:
    """Anything but a value or a WireError is a bug, and escapes."""
    try:
        decode()
    except WireError:
        return False
    return True


@given(st.binary(max_size=200))
def test_random_bytes_are_valid_or_wire_errors(data: bytes) -> None:
    codec = Codec[Message](ANY_MESSAGE)
    is_valid(lambda: codec.decode([data]))
    is_valid(lambda: decode_hello(data))
    is_valid(lambda: decode_refusal(data))
