"""Batch files: what a line may ask for, what is answered, and that a killed run loses and repeats nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncpipe.client import Choice, Generation
from asyncpipe.errors import AsyncPipeError, Busy, Closed, Invalid, StageLost
from asyncpipe.wire.messages import Usage
from asyncpipe.wire.sampling import Alternative, FinishReason, TokenLogprobs
from asyncpipe_coordinator import batch_input
from asyncpipe_coordinator.batch_files import SYNC_PERIOD_S, ResultWriter
from asyncpipe_coordinator.batch_input import InputLine, count_lines, read_lines
from asyncpipe_coordinator.batch_lines import (
    BatchRequest,
    LineFormat,
    find_custom_id,
    openai_result,
    parse_line,
    plain_result,
)
from asyncpipe_coordinator.batch_order import LineSet, Reorder

# --- lines: the plain format ------------------------------------------------------------------------------------------


def parse(**fields: Any) -> BatchRequest:
    return parse_line(json.dumps(fields), 7)


def test_a_plain_line_says_what_it_needs_to_say() -> None:
    assert parse(prompt="Hi") == BatchRequest(7, None, "Hi", {}, 0, LineFormat.PLAIN)


def test_a_plain_line_may_have_token_ids_an_id_a_priority_and_every_sampling_parameter() -> None:
    options = {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 3,
        "n": 2,
        "stop": ["x", "y"],
        "stop_token_ids": [4],
        "min_tokens": 1,
        "ignore_eos": True,
        "logprobs": 2,
        "prompt_logprobs": 0,
    }
    request = parse(prompt_token_ids=[5, 6], custom_id=12, priority=-3, **options)
    assert request == BatchRequest(7, "12", (5, 6), options, -3, LineFormat.PLAIN)


def test_one_stop_string_and_the_other_name_of_max_new_tokens_are_taken() -> None:
    assert parse(prompt="Hi", stop="\n", max_tokens=3).options == {"stop": "\n", "max_new_tokens": 3}


@pytest.mark.parametrize("where", ["plain", "openai"])
def test_logit_bias_has_numbers_for_keys(where: str) -> None:
    bias = {"50": -100, "7": 0.5}
    request = parse(prompt="Hi", logit_bias=bias) if where == "plain" else parse_body(prompt="Hi", logit_bias=bias)
    assert request.options["logit_bias"] == {50: -100.0, 7: 0.5}


def test_null_is_the_same_as_left_out() -> None:
    request = parse(prompt="Hi", prompt_token_ids=None, custom_id=None, priority=None, temperature=None, max_tokens=None)
    assert request == parse(prompt="Hi")


def test_bytes_texts_and_the_byte_order_mark_of_windows_are_read() -> None:
    assert parse_line(b'\xef\xbb\xbf{"prompt": "\xc3\xa9"}\r', 1).prompt == "é"
    assert parse_line('{"prompt": "é"}', 1).prompt == "é"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: Input data was truncated"),
        ("", "not JSON"),
        (b'{"prompt": "\xff"}', "not JSON: 'utf-8' codec"),
        (b'{"prompt": "\\ud800 half a character"}', "not JSON"),
        ('{"prompt": "\ud800"}', "not JSON"),
        (b"[" * 100_000, "not JSON: maximum recursion depth"),
        ('{"prompt": "a", "temperature": NaN}', "not JSON"),
        ('["a"]', 'not a JSON object; write one like {"prompt"'),
        ("{}", 'either "prompt" (a text) or "prompt_token_ids"'),
        ('{"prompt": "a", "prompt_token_ids": [1]}', 'either "prompt" (a text) or "prompt_token_ids"'),
        ('{"prompt": [1]}', 'token ids go into "prompt_token_ids"'),
        ('{"prompt": ""}', "an empty prompt"),
        (json.dumps({"prompt": "a" * 4_000_001}), "4000001 characters; at most 4000000"),
        ('{"prompt_token_ids": []}', "at least one token"),
        ('{"prompt_token_ids": "a"}', '"prompt_token_ids" must be a list of token ids: Expected array, got str'),
        ('{"prompt_token_ids": [1, -1]}', "Expected int >= 0"),
        ('{"prompt_token_ids": [1, true]}', "Expected int, got bool"),
        ('{"prompt": "a", "temprature": 1}', '"temprature" is not supported; did you mean "temperature"? known: prompt,'),
        ('{"prompt": "a", "zzz": null}', '"zzz" is not supported; known: prompt, prompt_token_ids, custom_id, priority,'),
        ('{"prompt": "a", "custom_id": 1.5}', '"custom_id" must be a text or a whole number'),
        ('{"prompt": "a", "custom_id": true}', '"custom_id" must be'),
        ('{"prompt": "a", "priority": 1001}', '"priority" must be a whole number from -1000 to 1000'),
        ('{"prompt": "a", "priority": false}', '"priority" must be'),
        ('{"prompt": "a", "max_tokens": 1, "max_new_tokens": 1}', "they mean the same"),
        ('{"prompt": "a", "temperature": -1}', "temperature = -1"),
        ('{"prompt": "a", "stop": [3]}', "stop = [3]"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', '"logit_bias" must be token ids with numbers'),
        ('{"prompt": "a", "logit_bias": {"1": 200}}', "logit_bias = {1: 200.0}"),
    ],
)
def test_a_line_that_cannot_be_is_refused_in_one_clear_message(line: bytes | str, message: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_line(line, 1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_id_of_a_refused_line_is_found_where_there_is_one() -> None:
    assert find_custom_id('{"custom_id": "a", "prompt": 3}') == "a"
    assert find_custom_id('{"custom_id": 5}') == "5"
    for line in ('{"custom_id": [1]}', '{"prompt": 3}', '{"custom_id": "a"', "[]", b"\xff"):
        assert find_custom_id(line) is None


# --- lines: the OpenAI format -----------------------------------------------------------------------------------------


def parse_body(**body: Any) -> BatchRequest:
    return parse(custom_id="a", method="POST", url="/v1/completions", body=body)


def test_an_openai_line_has_openai_defaults() -> None:
    request = parse_body(model="any", prompt="Hi")
    assert request == BatchRequest(7, "a", "Hi", {"max_new_tokens": 16, "temperature": 1.0}, 0, LineFormat.OPENAI)


def test_an_openai_line_may_set_what_openai_and_vllm_know() -> None:
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "stop": ["x"],
        "seed": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logprobs": 2,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 1,
        "ignore_eos": True,
        "stop_token_ids": [4],
    }
    request = parse_body(model="any", user="me", prompt=[5, 6], max_tokens=3, **options)
    assert request.prompt == (5, 6)
    assert request.options == {**options, "max_new_tokens": 3}


def test_what_changes_nothing_in_an_openai_line_is_ignored() -> None:
    neutral = parse_body(
        prompt="Hi", suffix=None, max_tokens=None, temperature=None, stream=False, echo=False, best_of=None, top_k=-1
    )
    assert neutral.options == {"max_new_tokens": 16, "temperature": 1.0, "top_k": 0}


@pytest.mark.parametrize(("prompt", "meant"), [(["Hi"], "Hi"), ([[1, 2]], (1, 2)), ([1], (1,))])
def test_a_list_with_one_prompt_is_that_prompt(prompt: Any, meant: object) -> None:
    assert parse_body(prompt=prompt).prompt == meant


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ["a", "b"]}, "one prompt a line: this line has 2"),
        ({"prompt": [[1], [2], [3]]}, "one prompt a line: this line has 3"),
        ({"prompt": []}, "at least one token"),
        ({"prompt": [1, "a"]}, '"prompt" must be a text or a list of token ids'),
        ({"prompt": 5}, '"prompt" must be a text or a list of token ids'),
        ({}, '"prompt" must be a text or a list of token ids'),
        ({"prompt": ""}, "an empty prompt"),
        ({"prompt": "a", "best_of": 2}, '"best_of" is not supported'),
        ({"prompt": "a", "echo": True}, '"echo" is not supported'),
        ({"prompt": "a", "stream": True}, '"stream" is not supported'),
        ({"prompt": "a", "max_new_tokens": 3}, 'did you mean "max_tokens"?'),
        ({"prompt": "a", "logprobs": True}, "logprobs = True"),
        ({"prompt": "a", "max_tokens": 0}, "max_new_tokens = 0: expected int >= 1"),
    ],
)
def test_an_openai_body_that_cannot_be_is_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_body(**body)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"url": "/v1/chat/completions"},
            "only /v1/completions is supported in batch files; this line asks for /v1/chat/compl",
        ),
        ({"url": None}, "only /v1/completions is supported in batch files; this line asks for none"),
        ({"method": "GET"}, '"method" must be "POST"; this line has \'GET\''),
        ({"body": "a"}, '"body" must be an object'),
        ({"body": None}, '"body" must be an object'),
        ({"bodyy": 1}, '"bodyy" is not supported; did you mean "body"?'),
    ],
)
def test_an_openai_envelope_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(**{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi"}, **fields})
    assert message in str(caught.value)


# --- lines: results ---------------------------------------------------------------------------------------------------

LOGPROBS = (TokenLogprobs(8, -0.5, 2, (Alternative(9, -0.25), Alternative(8, -0.5))), TokenLogprobs(3, -0.125, 1))
FIRST = Choice(text="!", token_ids=(8, 3), finish_reason=FinishReason.STOP)
SECOND = Choice(text="?", token_ids=(9,), finish_reason=FinishReason.LENGTH)


def outcome(*choices: Choice, prompt_logprobs: tuple[TokenLogprobs, ...] = ()) -> Generation:
    return Generation(
        request_id="r",
        prompt_token_ids=(1, 2),
        choices=choices,
        usage=Usage(
            prompt_tokens=2,
            completion_tokens=sum(len(choice.token_ids) for choice in choices),
            time_to_first_token_s=0.123456,
            total_s=1.0,
        ),
        prompt_logprobs=prompt_logprobs,
    )


def as_json(value: object) -> Any:
    return json.loads(msgspec.json.encode(value))


def test_a_plain_result_repeats_the_prompt_as_it_was_given() -> None:
    assert as_json(plain_result(parse(prompt="Hi", custom_id="a"), outcome(FIRST))) == {
        "line": 7,
        "custom_id": "a",
        "prompt": "Hi",
        "token_ids": [8, 3],
        "text": "!",
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "total_tokens": 4,
            "time_to_first_token_s": 0.1235,
            "total_s": 1.0,
        },
    }
    result = as_json(plain_result(parse(prompt_token_ids=[1, 2]), outcome(FIRST)))
    assert result["prompt_token_ids"] == [1, 2]
    assert result.keys() & {"custom_id", "prompt", "choices", "logprobs", "prompt_logprobs"} == set()


def test_a_plain_result_of_several_choices_has_the_first_ones_fields_and_all_of_them() -> None:
    result = as_json(plain_result(parse(prompt="Hi", n=2), outcome(FIRST, SECOND)))
    assert (result["text"], result["token_ids"], result["finish_reason"]) == ("!", [8, 3], "stop")
    assert result["choices"] == [
        {"index": 0, "text": "!", "token_ids": [8, 3], "finish_reason": "stop"},
        {"index": 1, "text": "?", "token_ids": [9], "finish_reason": "length"},
    ]


def test_log_probabilities_are_in_both_formats() -> None:
    choice = Choice(text="!", token_ids=(8, 3), finish_reason=FinishReason.STOP, logprobs=LOGPROBS)
    plain = as_json(plain_result(parse(prompt="Hi"), outcome(choice, prompt_logprobs=LOGPROBS)))
    assert plain["logprobs"] == plain["prompt_logprobs"]
    assert plain["logprobs"] == [
        {
            "token_id": 8,
            "logprob": -0.5,
            "rank": 2,
            "top": [{"token_id": 9, "logprob": -0.25}, {"token_id": 8, "logprob": -0.5}],
        },
        {"token_id": 3, "logprob": -0.125, "rank": 1, "top": []},
    ]
    openai = as_json(openai_result(parse_body(prompt="Hi"), outcome(choice), "m"))
    assert openai["response"]["body"]["choices"][0]["logprobs"] == {
        "tokens": ["token_id:8", "token_id:3"],
        "token_logprobs": [-0.5, -0.125],
        "top_logprobs": [{"token_id:9": -0.25, "token_id:8": -0.5}, {}],
    }


def test_an_openai_result_is_a_line_of_an_openai_output_file() -> None:
    assert as_json(openai_result(parse_body(prompt="Hi", n=2), outcome(FIRST, SECOND), "m", created_at_s=5)) == {
        "id": "batch_req_7",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "req_7",
            "body": {
                "id": "cmpl-7",
                "object": "text_completion",
                "created": 5,
                "model": "m",
                "choices": [
                    {"index": 0, "text": "!", "finish_reason": "stop", "logprobs": None},
                    {"index": 1, "text": "?", "finish_reason": "length", "logprobs": None},
                ],
                "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
            },
        },
        "error": None,
        "line": 7,
    }


# --- the input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An input of eight lines."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' * 8)
    return path


def test_blank_lines_are_numbered_and_left_out_and_the_last_line_needs_no_newline(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n one\r\n \t\r\n\n\ntwo\nthree ")
    assert list(read_lines(path)) == [InputLine(2, b" one", None), InputLine(6, b"two", None), InputLine(7, b"three ", None)]
    assert list(read_lines(path, 3)) == [InputLine(6, b"two", None), InputLine(7, b"three ", None)]
    assert count_lines(path) == 3


@pytest.mark.parametrize("content", [b"x\ny\n", b"x\n\ny", b"xx\ny", b"x \n\n\n\ny", b"\nx\n\n", b"  \n x", b"xyz"])
@pytest.mark.parametrize("buffer_bytes", [2, 3, 4])
def test_lines_are_counted_across_the_pieces_in_which_a_file_is_read(
    tmp_path: Path, content: bytes, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_input, "BUFFER_BYTES", buffer_bytes)
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    assert count_lines(path) == len(content.split())


def test_an_empty_input_has_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.touch()
    assert list(read_lines(path)) == []
    assert count_lines(path) == 0


def test_a_line_above_the_limit_is_an_error_and_the_next_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"x" * 10 + b"\n" + b"x" * 11 + b"\n" + b"x" * 100 + b"\nok\n" + b"x" * 12)
    lines = list(read_lines(path, max_line_bytes=10))
    assert [line.number for line in lines] == [1, 2, 3, 4, 5]
    assert [line.data for line in lines] == [b"x" * 10, None, None, b"ok", None]
    assert [str(line.error) for line in lines if line.error] == ["the line is longer than 10 bytes"] * 3


def test_memory_does_not_grow_with_the_input_or_its_longest_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"x" * 16_000_000 + b"\n" + b"y\n" * 20_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_lines(path, max_line_bytes=1_000_000)) == count_lines(path) == 20_001
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("use", [count_lines, lambda path: list(read_lines(path))])
def test_an_input_that_cannot_be_read_is_one_clear_line(tmp_path: Path, use: Callable[[Path], object]) -> None:
    with pytest.raises(Invalid, match=r"cannot read .*nowhere: No such file or directory"):
        use(tmp_path / "nowhere")
    with pytest.raises(Invalid, match="not a regular file"):
        use(tmp_path)


# --- the results ------------------------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def writer(source: Path, output: Path) -> Callable[..., ResultWriter]:
    """Makes a writer of `output`, not yet entered."""

    def make(**settings: Any) -> ResultWriter:
        return ResultWriter(output, **{"input_path": source, "fingerprint": "f", **settings})

    return make


def records(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def errors_of(output: Path) -> Path:
    return output.with_name(output.name + ".errors.jsonl")


def progress_of(output: Path) -> Path:
    return output.with_name(output.name + ".progress.json")


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


Writers = Callable[..., ResultWriter]


def test_results_and_errors_go_to_their_files(writer: Writers, output: Path) -> None:
    with writer() as results:
        results.write_result(2, {"text": "b"})
        results.write_error(1, "id", StageLost("stage 3 died"))
        results.write_error(3, None, ValueError("?"))
        assert (results.num_done, results.num_errors) == (3, 2)
        assert [results.is_done(line) for line in range(1, 5)] == [True, True, True, False]
        results.finish()
    assert records(output) == [{"text": "b", "line": 2}]
    assert records(errors_of(output)) == [
        {"line": 1, "custom_id": "id", "error": {"code": "stage_lost", "message": "stage 3 died"}},
        {"line": 3, "custom_id": None, "error": {"code": "remote", "message": "ValueError: ?"}},
    ]
    assert names_in(output.parent) == {"in.jsonl", "out.jsonl", "out.jsonl.errors.jsonl", "out.jsonl.progress.json"}


def test_without_an_error_there_is_no_errors_file(writer: Writers, output: Path) -> None:
    with writer() as results:
        results.write_result(1, {})
        results.finish()
    assert not errors_of(output).exists()


def test_the_errors_file_may_be_named(writer: Writers, tmp_path: Path) -> None:
    errors = tmp_path / "bad.jsonl"
    with writer(errors=errors) as results:
        results.write_error(1, None, Invalid("no"))
    with writer(errors=errors) as results:
        assert (results.num_done, results.num_errors) == (1, 1)


def test_a_second_run_continues_the_first(writer: Writers, output: Path) -> None:
    with writer() as results:
        results.write_result(3, {})
        results.write_error(5, None, Invalid("no"))
    with writer() as results:
        assert [line for line in range(1, 9) if results.is_done(line)] == [3, 5]
        assert (results.num_done, results.num_errors) == (2, 1)
        results.write_result(1, {})
    assert records(output) == [{"line": 3}, {"line": 1}]


def test_a_complete_run_is_continued_by_doing_nothing(writer: Writers, source: Path, output: Path) -> None:
    with writer() as results:
        for line in range(1, 9):
            results.write_result(line, {})
        results.finish()
    before = output.read_bytes()
    with writer() as results:
        assert all(results.is_done(line.number) for line in read_lines(source))
        results.finish()
    assert output.read_bytes() == before


def test_lines_are_tried_again_when_the_errors_file_is_removed(writer: Writers, output: Path) -> None:
    with writer() as results:
        results.write_result(1, {})
        results.write_error(2, None, Invalid("no"))
    errors_of(output).unlink()
    with writer() as results:
        assert [line for line in range(1, 9) if results.is_done(line)] == [1]


def test_a_line_has_one_record(writer: Writers, output: Path) -> None:
    with writer() as results:
        results.write_result(1, {})
        with pytest.raises(Invalid, match="line 1 is done"):
            results.write_error(1, None, Invalid("no"))
    assert not errors_of(output).exists()


def test_nothing_is_written_outside_the_with_block(writer: Writers) -> None:
    results = writer()
    with results:
        pass
    with pytest.raises(Closed):
        results.write_result(1, {})
    with pytest.raises(Closed):
        results.write_error(1, None, Invalid("no"))
    with pytest.raises(Closed):
        results.finish()


@pytest.mark.parametrize("which", [Path, errors_of])
def test_a_record_cut_short_is_cut_off(writer: Writers, output: Path, which: Callable[[Path], Path]) -> None:
    with writer() as results:
        results.write_result(1, {})
        results.write_error(2, None, Invalid("no"))
    file = which(output)
    with file.open("ab") as stream:
        stream.write(b'{"line": 3, "te')
    with writer() as results:
        assert (results.num_done, results.num_errors) == (2, 1)
        results.write_result(3, {})
        results.write_error(4, None, Invalid("no"))
    assert sorted(record["line"] for record in records(output) + records(errors_of(output))) == [1, 2, 3, 4]


@pytest.mark.parametrize("content", [b"", b"damaged", b'{"input": "x"}\n', None])
def test_results_that_do_not_say_whose_they_are_are_not_touched(writer: Writers, output: Path, content: bytes | None) -> None:
    output.write_bytes(b"precious")
    if content is not None:
        progress_of(output).write_bytes(content)
    with (
        pytest.raises(Invalid, match=r"out.jsonl is not empty, and no readable out.jsonl.progress.json.* --overwrite"),
        writer(),
    ):
        pass
    assert output.read_bytes() == b"precious"


def test_an_errors_file_of_another_run_is_not_touched(writer: Writers, output: Path) -> None:
    errors_of(output).write_bytes(b"precious")
    with pytest.raises(Invalid, match=r"errors.jsonl is not empty, and no readable .* --overwrite"), writer():
        pass
    assert errors_of(output).read_bytes() == b"precious"


def rewrite(path: Path, content: bytes, *, mtime_ns: int) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))


@pytest.mark.parametrize(
    ("settings", "content", "mtime_ns", "message"),
    [
        ({"fingerprint": "g"}, None, None, "the model or the options were different"),
        ({"errors": Path("other.jsonl")}, None, None, "its errors went to .*out.jsonl.errors.jsonl; now .*/other.jsonl"),
        ({"input_path": Path(__file__)}, None, None, "its input was .*in.jsonl; now it is .*test_batch_files.py"),
        ({}, b"longer", 5, r"in.jsonl had 128 bytes then and has 6 now"),
        ({}, b"x" * 128, 0, "the beginning of .*in.jsonl has changed"),
        ({}, b'{"prompt": "a"}\n' * 8, 5, "in.jsonl has been modified"),
    ],
)
def test_another_run_on_the_same_output_is_refused_and_told_what_differs(
    writer: Writers,
    source: Path,
    output: Path,
    settings: dict[str, Any],
    content: bytes | None,
    mtime_ns: int | None,
    message: str,
) -> None:
    rewrite(source, source.read_bytes(), mtime_ns=0)
    with writer() as results:
        results.write_result(1, {})
    if content is not None and mtime_ns is not None:
        rewrite(source, content, mtime_ns=mtime_ns)
    with pytest.raises(Invalid, match=f"another run .*{message}.*--overwrite"), writer(**settings):
        pass
    assert records(output) == [{"line": 1}]
    with writer(**settings, overwrite=True) as results:
        assert results.num_done == 0
    with writer(**settings):
        pass


def test_a_run_without_results_does_not_stand_in_the_way_of_another(writer: Writers) -> None:
    with writer():
        pass
    with writer(fingerprint="g") as results:
        results.write_result(1, {})
    with writer(fingerprint="g") as results:
        assert results.num_done == 1


def test_overwrite_starts_afresh(writer: Writers, output: Path) -> None:
    with writer() as results:
        results.write_result(1, {})
        results.write_error(2, None, Invalid("no"))
    with writer(overwrite=True) as results:
        assert (results.num_done, results.num_errors) == (0, 0)
        results.write_result(1, {"text": "new"})
    assert records(output) == [{"text": "new", "line": 1}]
    assert not errors_of(output).exists()


@pytest.mark.parametrize(
    "record", [b"x", b"{}", b'{"line": 0}', b'{"line": "1"}', b'{"line": 129}', b'{"line": 1e30}', b"[1]", b""]
)
def test_what_is_no_record_of_this_run_is_named(writer: Writers, output: Path, record: bytes) -> None:
    with writer() as results:
        results.write_result(1, {})
    with output.open("ab") as stream:
        stream.write(record + b"\n")
    with pytest.raises(Invalid, match=r"out.jsonl:2 is not a record of this run: .*--overwrite"), writer():
        pass


def test_two_runs_cannot_write_to_the_same_files(writer: Writers, tmp_path: Path) -> None:
    errors = tmp_path / "bad.jsonl"
    with writer(errors=errors) as results:
        results.write_error(1, None, Invalid("no"))
        for settings in ({}, {"overwrite": True}):
            with (
                pytest.raises(Invalid, match=r"another run is writing to .*out.jsonl: wait"),
                writer(errors=errors, **settings),
            ):
                pass
        other = ResultWriter(tmp_path / "other.jsonl", input_path=tmp_path / "in.jsonl", fingerprint="f", errors=errors)
        with pytest.raises(Invalid, match=r"another run is writing to .*bad.jsonl"), other:
            pass
    with writer(errors=errors) as results:
        assert results.num_done == 1


def test_errors_of_two_runs_do_not_mix_when_both_began_without_any(writer: Writers, tmp_path: Path) -> None:
    errors = tmp_path / "bad.jsonl"
    other = ResultWriter(tmp_path / "other.jsonl", input_path=tmp_path / "in.jsonl", fingerprint="f", errors=errors)
    with writer(errors=errors) as results, other:
        results.write_error(1, None, Invalid("no"))
        for _ in range(2):
            with pytest.raises(Invalid, match=r"another run is writing to .*bad.jsonl"):
                other.write_error(1, None, Invalid("no"))
        assert other.num_done == other.num_errors == 0
    assert len(records(errors)) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"output": "in.jsonl"}, "--input and --output are the same file"),
        ({"errors": "in.jsonl"}, "--input and --errors are the same file"),
        ({"errors": "out.jsonl"}, "--output and --errors are the same file"),
        ({"output": "link"}, "--input and --output are the same file"),
        ({"errors": "out.jsonl.progress.json"}, "--errors and --output's .progress.json are the same file"),
    ],
)
def test_no_file_is_used_twice(source: Path, names: dict[str, str], message: str) -> None:
    (source.parent / "link").symlink_to(source)
    before = source.read_bytes()
    output = source.parent / names.get("output", "out.jsonl")
    errors = source.parent / names.get("errors", "bad.jsonl")
    with (
        pytest.raises(Invalid, match=message),
        ResultWriter(output, input_path=source, fingerprint="f", errors=errors, overwrite=True),
    ):
        pass
    assert source.read_bytes() == before


def test_files_that_cannot_be_written_are_one_clear_line(writer: Writers, source: Path, tmp_path: Path) -> None:
    for output, message in (
        (tmp_path / "nowhere" / "out.jsonl", r"cannot write to .*nowhere/out.jsonl: No such file or directory"),
        (tmp_path, "cannot write to .*: Is a directory"),
        (Path("/dev/null"), "cannot write to /dev/null: it is not a regular file"),
    ):
        with pytest.raises(Invalid, match=message), ResultWriter(output, input_path=source, fingerprint="f"):
            pass
    with (
        pytest.raises(Invalid, match=r"cannot read .*gone: No such file"),
        ResultWriter(tmp_path / "out.jsonl", input_path=tmp_path / "gone", fingerprint="f"),
    ):
        pass
    with writer(errors=tmp_path / "nowhere" / "bad.jsonl") as results:
        with pytest.raises(Invalid, match=r"cannot write to .*bad.jsonl: No such file or directory"):
            results.write_error(1, None, Invalid("no"))
        assert not results.is_done(1)


def test_a_full_disk_is_one_clear_line_and_leaves_whole_records(writer: Writers, output: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with writer() as results:
        results.write_result(1, {})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            with pytest.raises(
                AsyncPipeError, match=rf"cannot write to .*out.jsonl: {os.strerror(errno.EFBIG)}; the same comm"
            ):
                results.write_result(2, {"text": "x" * 2000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (results.is_done(2), results.num_done) == (False, 1)
        assert output.read_bytes() == b'{"line":1}\n'
        results.write_result(2, {})
    assert records(output) == [{"line": 1}, {"line": 2}]


def test_records_are_put_on_the_disk_every_few_seconds_and_at_the_end(
    writer: Writers, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    synced: list[int] = []
    with writer(clock=lambda: now_s) as results:
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
        results.write_result(1, {})
        results.write_error(2, None, Invalid("no"))
        assert synced == []
        now_s += SYNC_PERIOD_S
        results.write_result(3, {})
        assert synced == [output.stat().st_ino, errors_of(output).stat().st_ino]
        now_s += SYNC_PERIOD_S - 0.1
        results.write_result(4, {})
        assert len(synced) == 2
        results.finish()
        assert synced[2:] == [output.stat().st_ino]
        results.write_result(5, {})
    assert synced[3:] == [output.stat().st_ino]  # also when the run does not come to its end


def test_the_record_of_what_is_done_is_small() -> None:
    tracemalloc.start()
    try:
        lines = LineSet()
        for line in range(10_000_000, 0, -9_999):
            lines.add(line)
            lines.add(line)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert len(lines) == 1001
    assert 10_000_000 in lines
    assert all(line not in lines for line in (0, 9_999_999, 10_000_001, 1 << 40))


# --- the order --------------------------------------------------------------------------------------------------------


def test_results_come_out_in_the_order_in_which_lines_were_begun() -> None:
    reorder: Reorder[str] = Reorder(4)
    for line in (2, 3, 7, 9):
        reorder.expect(line)
    assert reorder.push(7, "c") == []
    assert reorder.push(3, "b") == []
    assert reorder.num_held == 2
    assert reorder.push(2, "a") == [(2, "a"), (3, "b"), (7, "c")]
    assert reorder.num_held == 0
    assert reorder.push(9, "d") == [(9, "d")]


def test_a_slow_line_does_not_make_the_others_pile_up() -> None:
    reorder: Reorder[None] = Reorder(2)
    reorder.expect(1)
    reorder.expect(2)
    reorder.push(2, None)
    assert not reorder.has_room
    with pytest.raises(Busy, match="2 lines wait for line 1"):
        reorder.expect(3)
    reorder.push(1, None)
    assert reorder.has_room


def test_a_line_is_expected_once_and_pushed_once() -> None:
    reorder: Reorder[None] = Reorder(4)
    reorder.expect(1)
    reorder.expect(2)
    reorder.push(2, None)
    for line in (1, 2):
        with pytest.raises(Invalid, match=f"line {line} is expected already"):
            reorder.expect(line)
    for line in (2, 5):
        with pytest.raises(Invalid, match=f"line {line} is not expected"):
            reorder.push(line, None)


# --- SIGKILL ----------------------------------------------------------------------------------------------------------

NUM_LINES = 8_000
# A process of its own, so that its children are forked from one without threads. Each child does the whole batch; even ones are
# killed after a time, which hits their start, and odd ones after having written something.
KILLER = """
import os, signal, sys, time, traceback
from pathlib import Path
from asyncpipe.errors import Invalid
from asyncpipe_coordinator.batch_files import ResultWriter
from asyncpipe_coordinator.batch_input import read_lines

source, output = Path(sys.argv[1]), Path(sys.argv[2])

def work():
    with ResultWriter(output, input_path=source, fingerprint="f") as writer:
        for line in read_lines(source):
            if writer.is_done(line.number):
                continue
            if line.number % 5 == 0:
                writer.write_error(line.number, None, Invalid("no"))
            else:
                writer.write_result(line.number, {"text": "x" * (line.number % 97)})
        writer.finish()

def start():
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def size():
    return output.stat().st_size if output.exists() else 0

num_killed = 0
for attempt in range(40):
    before = size()
    child = start()
    if attempt % 2 == 0:
        time.sleep(attempt * 0.0001)
    else:
        deadline = time.monotonic() + 5.0
        while size() < before + attempt * 7 and time.monotonic() < deadline:
            pass
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(1)
    num_killed += os.WIFSIGNALED(status)
status = os.waitpid(start(), 0)[1]
print(num_killed)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_run_that_is_killed_again_and_again_has_every_line_exactly_once(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'{"prompt": "a"}\n' * NUM_LINES)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(source), str(output)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 0
    results, errors = lines_of(output), lines_of(errors_of(output))
    assert sorted(results) == [line for line in range(1, NUM_LINES + 1) if line % 5]
    assert sorted(errors) == [line for line in range(1, NUM_LINES + 1) if line % 5 == 0]
    assert names_in(tmp_path) <= {"in.jsonl", "out.jsonl", "out.jsonl.errors.jsonl", "out.jsonl.progress.json"}


def lines_of(path: Path) -> Iterable[int]:
    return (record["line"] for record in records(path))
