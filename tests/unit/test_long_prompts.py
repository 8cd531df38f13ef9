"""Prompts that are tokenized on a thread: their requests begin, are cancelled and refused as others are."""

from __future__ import annotations

import asyncio
import threading
from typing import cast

import pytest

from asyncpipe.actors import ActorRef
from asyncpipe.errors import Busy, Invalid
from asyncpipe.model_place import BUNDLED_MODEL
from asyncpipe.wire.messages import Accepted, Generate, Sampling
from asyncpipe_coordinator.shell import long_prompts
from asyncpipe_coordinator.shell.long_prompts import LongPrompts
from asyncpipe_coordinator.text import TextCodec
from tests.support import run

LONG = "x" * (long_prompts.LONG_TEXT + 1)
CLIENT, OTHER = (cast(ActorRef, name) for name in ("client", "other"))


class SlowCodec:
    """Gives one token for each character, when it may."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def encode(self, text: str, max_tokens: int | None = None) -> tuple[int, ...]:
        assert self.may_go_on.wait(10)
        if text.startswith("bad"):
            raise Invalid("a bad text")
        return (7,) * len(text)


class Requests:
    """What was accepted, with who had cancelled it."""

    def __init__(self) -> None:
        self.codec = SlowCodec()
        self.accepted: list[tuple[str, ActorRef, bool]] = []
        self.prompts = LongPrompts(cast(TextCodec, self.codec), max_tokens=10, max_waiting=4, accept=self._accept)

    def begin(self, request_id: str, *, text: str = LONG, client: ActorRef = CLIENT) -> asyncio.Task[Accepted]:
        message = Generate(request_id=request_id, prompt=text, sampling=Sampling())
        return asyncio.ensure_future(self.prompts.tokenize(message, client))

    def _accept(self, message: Generate, client: ActorRef, is_cancelled: bool) -> Accepted:
        assert message.prompt is None
        assert message.prompt_token_ids is not None
        self.accepted.append((message.request_id, client, is_cancelled))
        return Accepted(request_id=message.request_id, prompt_token_ids=message.prompt_token_ids, seed=0)


def test_only_long_texts_wait_for_the_thread() -> None:
    for prompt, token_ids, is_long in (
        (LONG, None, True),
        (LONG[1:], None, False),
        (None, (1,) * 5000, False),
        (LONG, (1,), False),
    ):
        message = Generate(request_id="a", prompt=prompt, prompt_token_ids=token_ids, sampling=Sampling())
        assert LongPrompts.is_one(message) == is_long


def test_they_are_accepted_in_order_and_cancelled_by_who_asked() -> None:
    async def scenario() -> None:
        requests = Requests()
        answers = [requests.begin(name) for name in "abc"] + [requests.begin("b", client=OTHER)]
        await asyncio.sleep(0)
        requests.prompts.cancel("b", CLIENT)
        requests.prompts.cancel("nobody's", CLIENT)
        requests.codec.may_go_on.set()
        assert [(await answer).prompt_token_ids for answer in answers] == [(7,) * len(LONG)] * 4
        expected = [("a", CLIENT, False), ("b", CLIENT, True), ("c", CLIENT, False), ("b", OTHER, False)]
        assert requests.accepted == expected
        requests.prompts.close()

    run(scenario())


def test_one_that_is_refused_says_why_and_holds_up_no_other() -> None:
    async def scenario() -> None:
        requests = Requests()
        bad, good = requests.begin("a", text="bad" + LONG), requests.begin("b")
        requests.codec.may_go_on.set()
        with pytest.raises(Invalid, match="a bad text"):
            await bad
        assert (await good).request_id == "b"
        requests.prompts.close()

    run(scenario())


def test_too_many_are_refused_at_once() -> None:
    async def scenario() -> None:
        requests = Requests()
        answers = [requests.begin(name) for name in "abcde"]
        with pytest.raises(Busy, match="4 long prompts wait"):
            await answers[4]
        requests.codec.may_go_on.set()
        assert [(await answer).request_id for answer in answers[:4]] == [*"abcd"]
        assert (await requests.begin("f")).request_id == "f", "there is room again"
        requests.prompts.close()

    run(scenario())


def test_who_waits_is_told_when_it_ends() -> None:
    async def scenario() -> None:
        requests = Requests()
        answer = requests.begin("a")
        await asyncio.sleep(0)
        answer.cancel()
        await asyncio.wait([answer], timeout=5)
        assert answer.cancelled()
        assert not requests.prompts._waiting, "its place is free"
        requests.codec.may_go_on.set()
        requests.prompts.close()

    run(scenario())


def test_a_text_that_is_longer_than_any_of_so_many_tokens_is_not_tokenized() -> None:
    codec = TextCodec.load(BUNDLED_MODEL)
    with pytest.raises(Invalid, match=r"the prompt has 100,000 characters, which are more than 10 tokens in any case"):
        codec.encode("x" * 100_000, 10)
    assert len(codec.encode("import os\n" * 5, 10)) > 10, "it might have been few tokens"
