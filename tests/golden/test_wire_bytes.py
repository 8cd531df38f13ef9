"""The bytes of every message, checked against an independent MessagePack and pinned: they change only with the protocol."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest

from asyncpipe.actors.envelope import Envelope, EnvelopeKind, encode_envelope
from asyncpipe.errors import ErrorCode, ErrorData
from asyncpipe.ids import NodeId
from asyncpipe.transport.credit import Kind
from asyncpipe.wire import messages as m
from asyncpipe.wire.codec import Codec, encode
from asyncpipe.wire.handshake import Hello, encode_hello, encode_refusal
from asyncpipe.wire.tensors import DType, Tensor

ERROR = ErrorData(ErrorCode.STAGE_LOST, "stage 1 is gone")
PLAIN_ERROR = {"code": "stage_lost", "message": "stage 1 is gone", "retry_after_s": 0.0}
STAGE = m.StageStatus(stage=0, pid=7, device="cpu", host="h", layers=(0, 6), num_params=10, param_bytes=40)
HIDDEN = Tensor.from_numpy(np.array([[1.0, 2.0]], dtype=np.float32))

GOLDEN: list[tuple[m.Message, dict[str, Any]]] = [
    (m.Accepted(request_id="r", prompt_token_ids=(1, 2)), {"request_id": "r", "prompt_token_ids": [1, 2]}),
    (m.Generate(request_id="r", prompt="Once"), {"request_id": "r", "prompt": "Once"}),
    (
        m.Generate(
            request_id="r",
            prompt_token_ids=(5,),
            sampling=m.Sampling(max_new_tokens=9, temperature=0.5, top_k=3, top_p=0.25, seed=1, stop=("x",), ignore_eos=True),
            deadline_s=1.5,
        ),
        {
            "request_id": "r",
            "prompt_token_ids": [5],
            "sampling": {
                "max_new_tokens": 9,
                "temperature": 0.5,
                "top_k": 3,
                "top_p": 0.25,
                "seed": 1,
                "stop": ["x"],
                "ignore_eos": True,
            },
            "deadline_s": 1.5,
        },
    ),
    (m.Cancel(request_id="r"), {"request_id": "r"}),
    (m.GetStatus(), {}),
    (
        m.Status(
            model="opt",
            state="serving",
            uptime_s=1.0,
            num_micro_batches=3,
            requests_waiting=0,
            requests_running=1,
            requests_finished=2,
            prompt_tokens=30,
            generated_tokens=40,
            max_context_len=2048,
            stages=(STAGE,),
        ),
        {
            "model": "opt",
            "state": "serving",
            "uptime_s": 1.0,
            "num_micro_batches": 3,
            "requests_waiting": 0,
            "requests_running": 1,
            "requests_finished": 2,
            "prompt_tokens": 30,
            "generated_tokens": 40,
            "max_context_len": 2048,
            "stages": [
                {
                    "stage": 0,
                    "pid": 7,
                    "device": "cpu",
                    "host": "h",
                    "layers": [0, 6],
                    "num_params": 10,
                    "param_bytes": 40,
                    "steps": 0,
                    "busy_s": 0.0,
                    "busy_share": 0.0,
                }
            ],
        },
    ),
    (
        m.Piece(request_id="r", index=3, token_id=17, text="é"),
        {"request_id": "r", "index": 3, "token_id": 17, "text": "é"},
    ),
    (
        m.Finished(
            request_id="r",
            finish_reason=m.FinishReason.LENGTH,
            text="",
            usage=m.Usage(prompt_tokens=2, completion_tokens=3),
        ),
        {
            "request_id": "r",
            "finish_reason": "length",
            "text": "",
            "usage": {"prompt_tokens": 2, "completion_tokens": 3, "time_to_first_token_s": 0.0, "total_s": 0.0},
        },
    ),
    (m.Failed(request_id="r", error=ERROR), {"request_id": "r", "error": PLAIN_ERROR}),
    (m.Welcome(epoch=4), {"epoch": 4}),
    (
        m.Join(slot=1, pid=42, host="h", device="cuda:0", address="ipc://@a"),
        {"slot": 1, "pid": 42, "host": "h", "device": "cuda:0", "address": "ipc://@a"},
    ),
    (
        m.StageReport(stage=1, layers=(6, 12), num_params=100, param_bytes=400, load_s=0.5),
        {"stage": 1, "layers": [6, 12], "num_params": 100, "param_bytes": 400, "load_s": 0.5},
    ),
    (
        m.Tokens(epoch=1, micro_batch=2, step=3, token_ids=(4, 50_000)),
        {"epoch": 1, "micro_batch": 2, "step": 3, "token_ids": [4, 50_000]},
    ),
    (m.StageFailed(epoch=1, stage=0, error=ERROR), {"epoch": 1, "stage": 0, "error": PLAIN_ERROR}),
    (
        m.StageCounters(stage=1, steps=10, busy_s=0.5, span_s=1.0),
        {"stage": 1, "steps": 10, "busy_s": 0.5, "span_s": 1.0},
    ),
    (
        m.LoadStage(
            epoch=1,
            stage=0,
            num_stages=2,
            first_layer=0,
            last_layer=6,
            checkpoint="/models/opt",
            dtype="float32",
            max_context_len=2048,
        ),
        {
            "epoch": 1,
            "stage": 0,
            "num_stages": 2,
            "first_layer": 0,
            "last_layer": 6,
            "checkpoint": "/models/opt",
            "dtype": "float32",
            "max_context_len": 2048,
        },
    ),
    (m.Ready(stage=1), {"stage": 1}),
    (m.ConnectNext(epoch=1, address=None), {"epoch": 1, "address": None}),
    (m.GetCounters(), {}),
    (
        m.Step(
            epoch=1,
            micro_batch=2,
            step=3,
            delta=m.Delta(left=(7,), token_ids=(8,), joined=(m.Joined(sequence=9, token_ids=(1, 2), seed=5),)),
            hidden=HIDDEN,
        ),
        {
            "epoch": 1,
            "micro_batch": 2,
            "step": 3,
            "delta": [[7], [8], [[9, [1, 2], 0.0, 0, 1.0, 5]]],
            "hidden": [0, "float32", [1, 2]],
        },
    ),
    (m.ServiceReady(address="tcp://127.0.0.1:5550"), {"address": "tcp://127.0.0.1:5550"}),
    (m.ServiceFailed(error=ERROR), {"error": PLAIN_ERROR}),
]


@pytest.mark.parametrize(("message", "expected"), GOLDEN, ids=[type(message).__name__ for message, _ in GOLDEN])
def test_an_independent_messagepack_reads_the_same_and_so_do_we(message: m.Message, expected: dict[str, Any]) -> None:
    frames = encode(message)
    assert msgpack.unpackb(frames[0]) == {"type": type(message).__name__, **expected}
    decoded = Codec[m.Message](type(message)).decode([msgpack.packb(msgpack.unpackb(frames[0])), *frames[1:]])
    assert encode(decoded)[0] == frames[0]


def test_every_message_type_has_a_golden_example() -> None:
    types = {found for found in vars(m).values() if isinstance(found, type) and issubclass(found, m.Message)}
    assert types - {m.Message, m.Request} == {type(message) for message, _ in GOLDEN}


PINNED = {
    m.Cancel(request_id="r"): "82a474797065a643616e63656caa726571756573745f6964a172",
    m.GetStatus(): "81a474797065a9476574537461747573",
    m.Tokens(epoch=1, micro_batch=2, step=3, token_ids=(4, 50_000)): (
        "85a474797065a6546f6b656e73a565706f636801ab6d6963726f5f626174636802a47374657003a9746f6b656e5f6964739204cdc350"
    ),
    m.Piece(request_id="r", index=3, token_id=17, text="é"): (
        "85a474797065a55069656365aa726571756573745f6964a172a5696e64657803a8746f6b656e5f696411a474657874a2c3a9"
    ),
    m.Failed(request_id="r", error=ERROR): (
        "83a474797065a64661696c6564aa726571756573745f6964a172a56572726f7283a4636f6465aa73746167655f6c6f73"
        "74a76d657373616765af7374616765203120697320676f6e65ad72657472795f61667465725f73cb0000000000000000"
    ),
    m.ConnectNext(epoch=1, address=None): "83a474797065ab436f6e6e6563744e657874a565706f636801a761646472657373c0",
}


@pytest.mark.parametrize(("message", "pinned_hex"), PINNED.items(), ids=[type(message).__name__ for message in PINNED])
def test_the_bytes_are_pinned(message: m.Message, pinned_hex: str) -> None:
    assert bytes(encode(message)[0]).hex() == pinned_hex


def test_the_bytes_of_a_step_are_pinned_and_its_tensor_is_the_next_frame() -> None:
    step = m.Step(epoch=1, micro_batch=0, step=2, delta=m.Delta(token_ids=(3,)), hidden=HIDDEN)
    body, tensor = encode(step)
    assert bytes(body).hex() == (
        "86a474797065a453746570a565706f636801ab6d6963726f5f626174636800a47374657002a564656c74619390910390"
        "a668696464656e9300a7666c6f61743332920102"
    )
    assert bytes(tensor).hex() == "0000803f00000040"


def test_the_bytes_of_the_handshake_are_pinned() -> None:
    hello = encode_hello(Hello(node=NodeId("n"), role="worker", token="t"))
    assert msgpack.unpackb(hello) == {
        "magic": "asyncpipe",
        "major": 1,
        "minor": 0,
        "node": "n",
        "role": "worker",
        "token": "t",
        "window": 32,
        "max_frame_bytes": 1 << 30,
        "shm": "",
    }
    assert hello.hex() == (
        "89a56d61676963a96173796e6370697065a56d616a6f7201a56d696e6f7200a46e6f6465a16ea4726f6c65a6776f726b"
        "6572a5746f6b656ea174a677696e646f7720af6d61785f6672616d655f6279746573ce40000000a373686da0"
    )
    assert encode_refusal("no").hex() == "82a56d61676963a96173796e6370697065a772656675736564a26e6f"


def test_the_bytes_of_an_envelope_are_pinned() -> None:
    assert encode_envelope(Envelope(EnvelopeKind.ASK, "to", "from", 7)).hex() == "9401a2746fa466726f6d07"


def test_the_words_that_travel_are_pinned() -> None:
    assert [kind.value for kind in Kind] == list(range(1, 15))
    assert [dtype.value for dtype in DType] == (
        ["bool", "uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
    )
    assert [code.value for code in ErrorCode] == (
        ["closed", "broken", "stage_lost", "busy", "timeout", "wire", "refused", "invalid", "remote"]
    )
    assert [reason.value for reason in m.FinishReason] == ["stop", "length", "cancelled"]
