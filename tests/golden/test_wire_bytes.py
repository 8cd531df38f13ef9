"""The bytes of every message, checked against an independent MessagePack and pinned: they change only with the protocol."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest

from asyncpipe.actors.envelope import Envelope, EnvelopeKind, encode_envelope
from asyncpipe.errors import ErrorCode, ErrorData
from asyncpipe.ids import NodeId
from asyncpipe.policy import Policy
from asyncpipe.trace import SpanKind
from asyncpipe.transport.credit import Kind
from asyncpipe.wire import messages as m
from asyncpipe.wire.codec import Codec, encode
from asyncpipe.wire.handshake import Hello, encode_hello, encode_refusal
from asyncpipe.wire.links import LinkKind
from asyncpipe.wire.tensors import Buffer, DType, Tensor

ERROR = ErrorData(ErrorCode.STAGE_LOST, "stage 1 is gone")
PLAIN_ERROR = {"code": "stage_lost", "message": "stage 1 is gone", "retry_after_s": 0.0}
HIDDEN = Tensor.from_numpy(np.array([[1.0, 2.0]], dtype=np.float32))

SAMPLING = m.Sampling(
    max_new_tokens=9,
    temperature=0.5,
    top_k=3,
    top_p=0.25,
    min_p=0.125,
    repetition_penalty=1.5,
    presence_penalty=-0.5,
    frequency_penalty=0.75,
    logit_bias={7: -100.0, 70_000: 1.0},
    seed=1,
    n=2,
    stop=("x",),
    stop_token_ids=(2, 3),
    min_tokens=4,
    ignore_eos=True,
    logprobs=5,
    prompt_logprobs=0,
)
PLAIN_SAMPLING = {
    "max_new_tokens": 9,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.25,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.75,
    "logit_bias": {7: -100.0, 70_000: 1.0},
    "seed": 1,
    "n": 2,
    "stop": ["x"],
    "stop_token_ids": [2, 3],
    "min_tokens": 4,
    "ignore_eos": True,
    "logprobs": 5,
    "prompt_logprobs": 0,
}
LOGPROBS = m.TokenLogprobs(
    token_id=17,
    logprob=-0.5,
    rank=2,
    top=(m.Alternative(token_id=4, logprob=-0.25), m.Alternative(token_id=17, logprob=-0.5)),
)
PLAIN_LOGPROBS = [17, -0.5, 2, [[4, -0.25], [17, -0.5]]]

POLICY = Policy(gpu_batch_size=64, num_gpu_batches=3, w_gpu_percent=20.0, w_cpu_percent=80.0, attn_sparsity=0.5)
PLAIN_POLICY = {
    "gpu_batch_size": 64,
    "num_gpu_batches": 3,
    "w_gpu_percent": 20.0,
    "w_cpu_percent": 80.0,
    "cache_gpu_percent": 100.0,
    "cache_cpu_percent": 0.0,
    "act_gpu_percent": 100.0,
    "act_cpu_percent": 0.0,
    "overlap": True,
    "sep_layer": True,
    "pin_weight": True,
    "cpu_cache_compute": False,
    "attn_sparsity": 0.5,
    "compress_weight": False,
    "comp_weight_config": {"num_bits": 4, "group_size": 64},
    "compress_cache": False,
    "comp_cache_config": {"num_bits": 4, "group_size": 64},
    "placement": "exact",
}

PIECE = m.Piece(request_id="r", index=3, token_id=17, text="é")
PLAIN_PIECE = {"request_id": "r", "index": 3, "token_id": 17, "text": "é"}
SCORED = m.PromptScored(request_id="r", logprobs=(LOGPROBS, m.TokenLogprobs(token_id=5, logprob=-1.0, rank=1)))
PLAIN_SCORED = {"request_id": "r", "logprobs": [PLAIN_LOGPROBS, [5, -1.0, 1, []]]}
FINISHED = m.Finished(
    request_id="r",
    finish_reason=m.FinishReason.LENGTH,
    text="",
    usage=m.Usage(prompt_tokens=2, completion_tokens=3),
    choice=1,
)
PLAIN_FINISHED = {
    "request_id": "r",
    "finish_reason": "length",
    "text": "",
    "usage": {"prompt_tokens": 2, "completion_tokens": 3, "time_to_first_token_s": 0.0, "total_s": 0.0},
    "choice": 1,
}
FAILED = m.Failed(request_id="r", error=ERROR)
PLAIN_FAILED = {"request_id": "r", "error": PLAIN_ERROR}

STAGE = m.StageStatus(
    stage=0,
    pid=7,
    device="cpu",
    host="h",
    layers=(0, 6),
    num_params=10,
    param_bytes=40,
    idle=m.IdleTimes(starved_s=0.25, send_wait_s=0.5, no_work_s=1.0),
    link=LinkKind.GLOO,
    kv_blocks=64,
    transfers=m.TransferReport(weights=m.Moved(9, 0.5, 0.125)),
    peak_host_bytes=5,
    policy=POLICY,
    tiers=m.TierReport(weights=m.TierBytes(1, 2, 3)),
)
PLAIN_STAGE = {
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
    "transfers": {"weights": [9, 0.5, 0.125]},
    "peak_host_bytes": 5,
    "peak_device_bytes": 0,
    "idle": {"starved_s": 0.25, "send_wait_s": 0.5, "no_work_s": 1.0},
    "link": "gloo",
    "kv_blocks": 64,
    "policy": PLAIN_POLICY,
    "tiers": {"weights": [1, 2, 3]},
}
STATUS = m.Status(
    model="opt",
    state="serving",
    uptime_s=1.0,
    restarts=2,
    spares=1,
    requests_waiting=0,
    requests_running=1,
    requests_finished=2,
    requests_failed=3,
    prompt_tokens=30,
    generated_tokens=40,
    max_context_len=2048,
    pipeline=m.PipelineStatus(
        num_micro_batches=3,
        steps=5,
        ideal_s=1.5,
        measured_s=2.0,
        efficiency=0.75,
        bubble=0.125,
        round_trip_s=0.5,
        overhead_s=0.0625,
    ),
    kv=m.KVStatus(num_blocks=64, used_blocks=8, block_tokens=16, preemptions=1),
    stages=(STAGE,),
)
PLAIN_STATUS = {
    "model": "opt",
    "state": "serving",
    "uptime_s": 1.0,
    "restarts": 2,
    "spares": 1,
    "requests_waiting": 0,
    "requests_running": 1,
    "requests_finished": 2,
    "requests_failed": 3,
    "prompt_tokens": 30,
    "generated_tokens": 40,
    "max_context_len": 2048,
    "pipeline": {
        "num_micro_batches": 3,
        "steps": 5,
        "ideal_s": 1.5,
        "measured_s": 2.0,
        "efficiency": 0.75,
        "bubble": 0.125,
        "round_trip_s": 0.5,
        "overhead_s": 0.0625,
    },
    "kv": {"num_blocks": 64, "used_blocks": 8, "block_tokens": 16, "preemptions": 1},
    "stages": [PLAIN_STAGE],
}

TIMING = m.StageTiming(queue_us=20, compute_us=300)
DELTA = m.Delta(
    left=(7,),
    parted=(8,),
    adopted=(9, 10),
    token_ids=(50_000,),
    opened=(
        m.Opened(sequence=11, token_ids=(1, 2), num_prompt=2, sampling=SAMPLING),
        m.Opened(sequence=12, token_ids=(3, 4, 5), num_prompt=1),
    ),
    chunks=(m.Chunk(sequence=11, count=2),),
    padding=6,
    num_steps=7,
)
PLAIN_DELTA = {
    "left": [7],
    "parted": [8],
    "adopted": [9, 10],
    "token_ids": [50_000],
    "opened": [[11, [1, 2], 2, PLAIN_SAMPLING], [12, [3, 4, 5], 1, {}]],
    "chunks": [[11, 2]],
    "padding": 6,
    "num_steps": 7,
}
SPAN = m.Span(kind=1, micro_batch=2, step=3, start_ns=-4, duration_ns=5, num_rows=6)

GOLDEN: list[tuple[m.Message, dict[str, Any]]] = [
    (
        m.Accepted(request_id="r", prompt_token_ids=(1, 2), seed=2**62),
        {"request_id": "r", "prompt_token_ids": [1, 2], "seed": 2**62},
    ),
    (m.Generate(request_id="r", prompt="Once"), {"request_id": "r", "prompt": "Once"}),
    (
        m.Generate(request_id="r", prompt_token_ids=(5,), sampling=SAMPLING, priority=-3, deadline_s=1.5),
        {"request_id": "r", "prompt_token_ids": [5], "sampling": PLAIN_SAMPLING, "priority": -3, "deadline_s": 1.5},
    ),
    (
        m.Generate(request_id="r", prompt="Once", generated_token_ids=(9, 8)),
        {"request_id": "r", "prompt": "Once", "generated_token_ids": [9, 8]},
    ),
    (m.Cancel(request_id="r"), {"request_id": "r"}),
    (m.GetStatus(), {}),
    (STATUS, PLAIN_STATUS),
    (PIECE, PLAIN_PIECE),
    (
        m.Piece(request_id="r", index=3, token_id=17, text="", choice=1, logprobs=LOGPROBS),
        {"request_id": "r", "index": 3, "token_id": 17, "text": "", "choice": 1, "logprobs": PLAIN_LOGPROBS},
    ),
    (SCORED, PLAIN_SCORED),
    (FINISHED, PLAIN_FINISHED),
    (FAILED, PLAIN_FAILED),
    (
        m.Updates(updates=(SCORED, PIECE, FINISHED, FAILED)),
        {
            "updates": [
                {"type": "PromptScored", **PLAIN_SCORED},
                {"type": "Piece", **PLAIN_PIECE},
                {"type": "Finished", **PLAIN_FINISHED},
                {"type": "Failed", **PLAIN_FAILED},
            ]
        },
    ),
    (m.Welcome(epoch=4), {"epoch": 4}),
    (
        m.Join(slot=1, pid=42, host="h", device="cuda:0", address="ipc://@a"),
        {"slot": 1, "pid": 42, "host": "h", "device": "cuda:0", "address": "ipc://@a"},
    ),
    (
        m.Join(
            rank=3,
            stage=2,
            pid=42,
            host="h",
            machine="m",
            device="cuda:0",
            device_name="H100",
            card="GPU-1",
            memory_bytes=2**36,
            num_cores=16,
            address="tcp://10.0.0.7:41",
            public_key="k",
        ),
        {
            "rank": 3,
            "stage": 2,
            "pid": 42,
            "host": "h",
            "machine": "m",
            "device": "cuda:0",
            "device_name": "H100",
            "card": "GPU-1",
            "memory_bytes": 2**36,
            "num_cores": 16,
            "address": "tcp://10.0.0.7:41",
            "public_key": "k",
        },
    ),
    (
        m.StageReport(
            stage=1,
            layers=(6, 12),
            num_params=100,
            param_bytes=400,
            load_s=0.5,
            kv_blocks=64,
            kv_block_bytes=65_536,
            tiers=m.TierReport(weights=m.TierBytes(100, 200, 300), cache=m.TierBytes(disk=2**40), buffers=7),
        ),
        {
            "stage": 1,
            "layers": [6, 12],
            "num_params": 100,
            "param_bytes": 400,
            "load_s": 0.5,
            "kv_blocks": 64,
            "kv_block_bytes": 65_536,
            "tiers": {"weights": [100, 200, 300], "cache": [0, 0, 2**40], "buffers": 7},
        },
    ),
    (
        m.Tokens(epoch=1, micro_batch=2, step=3, token_ids=(4, 50_000)),
        {"epoch": 1, "micro_batch": 2, "step": 3, "token_ids": [4, 50_000]},
    ),
    (
        m.Tokens(
            epoch=1,
            micro_batch=2,
            step=3,
            token_ids=(4, 17),
            timings=(TIMING, m.StageTiming(queue_us=0, compute_us=70_000)),
            logprobs=(None, LOGPROBS),
            prompt_logprobs=(m.PromptLogprobs(sequence=9, logprobs=(LOGPROBS,)),),
        ),
        {
            "epoch": 1,
            "micro_batch": 2,
            "step": 3,
            "token_ids": [4, 17],
            "timings": [[20, 300], [0, 70_000]],
            "logprobs": [None, PLAIN_LOGPROBS],
            "prompt_logprobs": [[9, [PLAIN_LOGPROBS]]],
        },
    ),
    (m.StageFailed(epoch=1, stage=0, error=ERROR), {"epoch": 1, "stage": 0, "error": PLAIN_ERROR}),
    (
        m.StageCounters(
            stage=1,
            steps=10,
            busy_s=0.5,
            send_wait_s=0.25,
            span_s=1.0,
            transfers=m.TransferReport(cache_loads=m.Moved(9, 0.5, 0.125)),
            peak_host_bytes=5,
            peak_device_bytes=6,
        ),
        {
            "stage": 1,
            "steps": 10,
            "busy_s": 0.5,
            "send_wait_s": 0.25,
            "span_s": 1.0,
            "transfers": {"cache_loads": [9, 0.5, 0.125]},
            "peak_host_bytes": 5,
            "peak_device_bytes": 6,
        },
    ),
    (m.ClockReading(monotonic_ns=-(2**62)), {"monotonic_ns": -(2**62)}),
    (
        m.Spans(
            first=8,
            num_lost=2,
            spans=(SPAN, m.Span(kind=63, micro_batch=0, step=0, start_ns=2**62, duration_ns=2**53, num_rows=0)),
        ),
        {"first": 8, "num_lost": 2, "spans": [[1, 2, 3, -4, 5, 6], [63, 0, 0, 2**62, 2**53, 0]]},
    ),
    (
        m.LoadStage(
            epoch=1,
            stage=0,
            num_stages=2,
            first_layer=0,
            last_layer=6,
            checkpoint="/models/opt",
            model="facebook/opt-125m",
            device="cuda:1",
            cpus="0-3",
            previous_key="k",
            config_json="{}",
            dtype="float32",
            max_context_len=2048,
            max_sequences=32,
            eos_token_ids=(2,),
            num_threads=4,
            machine_threads=8,
            kv_block_tokens=16,
            kv_bytes=2**33,
            kv_share=0.25,
            dummy_weights=True,
            policy=POLICY,
            offload_dir="/tmp/offload",
            quantize="int8",
            kv_dtype="float16",
            model_impl="native",
        ),
        {
            "epoch": 1,
            "stage": 0,
            "num_stages": 2,
            "first_layer": 0,
            "last_layer": 6,
            "checkpoint": "/models/opt",
            "model": "facebook/opt-125m",
            "device": "cuda:1",
            "cpus": "0-3",
            "previous_key": "k",
            "config_json": "{}",
            "dtype": "float32",
            "max_context_len": 2048,
            "max_sequences": 32,
            "eos_token_ids": [2],
            "num_threads": 4,
            "machine_threads": 8,
            "kv_block_tokens": 16,
            "kv_bytes": 2**33,
            "kv_share": 0.25,
            "dummy_weights": True,
            "policy": PLAIN_POLICY,
            "offload_dir": "/tmp/offload",
            "quantize": "int8",
            "kv_dtype": "float16",
            "model_impl": "native",
        },
    ),
    (m.Ready(stage=1), {"stage": 1}),
    (m.Ready(stage=0, link=LinkKind.GLOO), {"stage": 0, "link": "gloo"}),
    (m.Ready(stage=0, obstacle="no nccl"), {"stage": 0, "obstacle": "no nccl"}),
    (m.ConnectNext(epoch=1, address=None), {"epoch": 1, "address": None}),
    (
        m.ConnectNext(epoch=1, address="tcp://b:5", public_key="k", link="gloo"),
        {"epoch": 1, "address": "tcp://b:5", "public_key": "k", "link": "gloo"},
    ),
    (
        m.HostLink(epoch=1, wanted="auto", machine="a", device="cuda:0", card="GPU-1", offered=(LinkKind.ZMQ, LinkKind.NCCL)),
        {"epoch": 1, "wanted": "auto", "machine": "a", "device": "cuda:0", "card": "GPU-1", "offered": ["zmq", "nccl"]},
    ),
    (
        m.LinkHosted(offer=m.LinkOffer(kind=LinkKind.NCCL, host_ip="10.0.0.7", port=41, epoch=1, token="t" * 32)),
        {"offer": {"kind": "nccl", "host_ip": "10.0.0.7", "port": 41, "epoch": 1, "token": "t" * 32}},
    ),
    (m.LinkHosted(obstacle="no nccl"), {"obstacle": "no nccl"}),
    (m.GetCounters(), {}),
    (m.GetClock(), {}),
    (m.GetSpans(first=8), {"first": 8}),
    (
        m.Step(epoch=1, micro_batch=2, step=3, delta=m.Delta(token_ids=(8, 50_000)), is_alone=True),
        {"epoch": 1, "micro_batch": 2, "step": 3, "delta": {"token_ids": [8, 50_000]}, "is_alone": True},
    ),
    (
        m.Step(epoch=1, micro_batch=2, step=3, delta=m.Delta(token_ids=(8,), num_steps=4), is_gathered=True),
        {"epoch": 1, "micro_batch": 2, "step": 3, "delta": {"token_ids": [8], "num_steps": 4}, "is_gathered": True},
    ),
    (
        m.Step(epoch=1, micro_batch=2, step=3, delta=DELTA, timings=(TIMING,), hidden=HIDDEN),
        {
            "epoch": 1,
            "micro_batch": 2,
            "step": 3,
            "delta": PLAIN_DELTA,
            "timings": [[20, 300]],
            "hidden": [0, "float32", [1, 2]],
        },
    ),
    (
        m.Step(epoch=1, micro_batch=2, step=3, delta=m.Delta(), posted=m.Posted(7, DType.BFLOAT16, (1, 2))),
        {"epoch": 1, "micro_batch": 2, "step": 3, "delta": {}, "posted": [7, "bfloat16", [1, 2]]},
    ),
    (m.ServiceReady(address="tcp://127.0.0.1:5550"), {"address": "tcp://127.0.0.1:5550"}),
    (m.ServiceFailed(error=ERROR), {"error": PLAIN_ERROR}),
]


def unpack(data: Buffer) -> Any:
    return msgpack.unpackb(data, strict_map_key=False)  # the keys of `logit_bias` are numbers


@pytest.mark.parametrize(("message", "expected"), GOLDEN, ids=[type(message).__name__ for message, _ in GOLDEN])
def test_an_independent_messagepack_reads_the_same_and_so_do_we(message: m.Message, expected: dict[str, Any]) -> None:
    frames = encode(message)
    assert unpack(frames[0]) == {"type": type(message).__name__, **expected}
    decoded = Codec[m.Message](type(message)).decode([msgpack.packb(unpack(frames[0])), *frames[1:]])
    assert encode(decoded)[0] == frames[0]


def test_every_message_type_has_a_golden_example() -> None:
    types = {found for found in vars(m).values() if isinstance(found, type) and issubclass(found, m.Message)}
    assert types - {m.Message, m.Request} == {type(message) for message, _ in GOLDEN}


def test_every_field_of_a_message_has_a_golden_example() -> None:
    examples = [*GOLDEN, (SAMPLING, PLAIN_SAMPLING), (DELTA, PLAIN_DELTA)]
    shown = {(type(struct), name) for struct, plain in examples for name in plain}
    assert shown == {(type(struct), name) for struct, _ in examples for name in struct.__struct_fields__}


PINNED: list[tuple[m.Message, str]] = [
    (m.Cancel(request_id="r"), "82a474797065a643616e63656caa726571756573745f6964a172"),
    (m.GetStatus(), "81a474797065a9476574537461747573"),
    (
        m.Tokens(epoch=1, micro_batch=2, step=3, token_ids=(4, 50_000)),
        "85a474797065a6546f6b656e73a565706f636801ab6d6963726f5f626174636802a47374657003a9746f6b656e5f6964739204cdc350",
    ),
    (
        m.Tokens(epoch=1, micro_batch=2, step=3, token_ids=(17,), logprobs=(LOGPROBS,)),
        (
            "86a474797065a6546f6b656e73a565706f636801ab6d6963726f5f626174636802a47374657003a9746f6b656e5f69647391"
            "11a86c6f6770726f6273919411cbbfe000000000000002929204cbbfd00000000000009211cbbfe0000000000000"
        ),
    ),
    (
        m.Updates(updates=(PIECE, FINISHED)),
        (
            "82a474797065a755706461746573a7757064617465739285a474797065a55069656365aa726571756573745f6964a172a569"
            "6e64657803a8746f6b656e5f696411a474657874a2c3a986a474797065a846696e6973686564aa726571756573745f6964a1"
            "72ad66696e6973685f726561736f6ea66c656e677468a474657874a0a5757361676584ad70726f6d70745f746f6b656e7302"
            "b1636f6d706c6574696f6e5f746f6b656e7303b574696d655f746f5f66697273745f746f6b656e5f73cb0000000000000000"
            "a7746f74616c5f73cb0000000000000000a663686f69636501"
        ),
    ),
    (
        m.Updates(updates=(FAILED,)),
        (
            "82a474797065a755706461746573a7757064617465739183a474797065a64661696c6564aa726571756573745f6964a172a5"
            "6572726f7283a4636f6465aa73746167655f6c6f7374a76d657373616765af7374616765203120697320676f6e65ad726574"
            "72795f61667465725f73cb0000000000000000"
        ),
    ),
    (
        m.Spans(first=8, num_lost=2, spans=(SPAN,)),
        "84a474797065a55370616e73a5666972737408a86e756d5f6c6f737402a57370616e739196010203fc0506",
    ),
    (m.ConnectNext(epoch=1, address=None), "83a474797065ab436f6e6e6563744e657874a565706f636801a761646472657373c0"),
]


@pytest.mark.parametrize(("message", "pinned_hex"), PINNED, ids=[type(message).__name__ for message, _ in PINNED])
def test_the_bytes_are_pinned(message: m.Message, pinned_hex: str) -> None:
    assert bytes(encode(message)[0]).hex() == pinned_hex


def test_the_bytes_of_a_step_are_pinned_and_its_tensor_is_the_next_frame() -> None:
    step = m.Step(epoch=1, micro_batch=0, step=2, delta=m.Delta(token_ids=(3,)), timings=(TIMING,), hidden=HIDDEN)
    body, tensor = encode(step)
    assert bytes(body).hex() == (
        "87a474797065a453746570a565706f636801ab6d6963726f5f626174636800a47374657002a564656c746181a9746f6b656e"
        "5f6964739103a774696d696e6773919214cd012ca668696464656e9300a7666c6f61743332920102"
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
    assert {kind.name: kind.value for kind in SpanKind} == {"STARVED": 0, "COMPUTE": 1, "SEND": 2, "WEIGHTS": 3}
