"""The requests that clients wait for: what the machine hears of them, and what their clients hear of the machine's commands."""

from __future__ import annotations

import secrets
import time

import msgspec

from asyncpipe.actors import ActorRef
from asyncpipe.errors import Invalid
from asyncpipe.wire.messages import Accepted, Failed, Finished, Generate, PromptScored, Usage
from asyncpipe.wire.sampling import MAX_CHOICES, FinishReason
from asyncpipe_coordinator.core import commands, events
from asyncpipe_coordinator.model_files import ModelInfo
from asyncpipe_coordinator.shell.choices import OpenChoice
from asyncpipe_coordinator.shell.clients import Clients, Recipient
from asyncpipe_coordinator.text import TextCodec

SEED_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: neighbouring choices get unrelated seeds


class Requests:
    """One `OpenChoice` for each text; the machine knows each of them as a request of its own."""

    def __init__(self, clients: Clients, *, codec: TextCodec, model: ModelInfo) -> None:
        self._clients = clients
        self._codec = codec
        self._model = model
        self._open: dict[str, OpenChoice] = {}  # by the machine's request id

    def of(self, client: ActorRef, *, request_id: str | None = None) -> list[str]:
        """The machine's ids of all that `client` waits for, or of the texts of one of its requests."""
        return [
            name
            for name, choice in self._open.items()
            if choice.client.ref == client and request_id in (None, choice.request_id)
        ]

    def open(self, message: Generate, sender: ActorRef) -> tuple[Accepted, list[events.Submitted]]:
        """The answer to `sender`, and what the machine is to be told. Raises Invalid."""
        token_ids = self._prompt_tokens(message)
        key = self._unique(message.request_id, sender)
        sampling, now_s = message.sampling, time.monotonic()
        if message.generated_token_ids and sampling.n > 1:
            raise Invalid(f"a request of {sampling.n} texts cannot go on after the tokens of one")
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        client = self._clients.get(sender)
        for choice in range(sampling.n):
            self._open[_choice_id(key, choice)] = self._choice(message, choice, client)
        submitted = [
            events.Submitted(
                request_id=_choice_id(key, choice),
                client=client.ref,
                prompt_token_ids=token_ids,
                sampling=sampling if choice == 0 else msgspec.structs.replace(sampling, prompt_logprobs=None),
                seed=(seed + choice * SEED_STEP) % 2**63,
                priority=message.priority,
                deadline_at_s=None if message.deadline_s is None else now_s + message.deadline_s,
                at_s=now_s,
                generated_token_ids=message.generated_token_ids,
            )
            for choice in range(sampling.n)
        ]
        return Accepted(request_id=message.request_id, prompt_token_ids=token_ids, seed=seed), submitted

    def emit(self, command: commands.EmitToken, *, is_last: bool) -> bool:
        """Tell the client. Whether its text now ends with one of its stop strings, which the machine does not know yet."""
        choice = self._open.get(command.request_id)
        if choice is None or choice.num_to_stop is not None:
            return False
        self._clients.update(choice.client, choice.piece(command, is_last=is_last))
        if choice.stops.found:
            choice.num_to_stop = command.index + 1
        return choice.stops.found

    def score(self, command: commands.EmitPromptLogprobs) -> None:
        choice = self._open.get(command.request_id)
        if choice is not None:
            self._clients.update(choice.client, PromptScored(request_id=choice.request_id, logprobs=command.logprobs))

    def finish(self, command: commands.FinishRequest) -> None:
        choice = self._open.pop(command.request_id, None)
        if choice is None:
            return
        reason, num_tokens = command.finish_reason, command.num_completion_tokens
        if choice.num_to_stop is not None:  # of several steps at once: more was computed, perhaps to another end
            reason, num_tokens = FinishReason.STOP, choice.num_to_stop
        usage = Usage(
            prompt_tokens=command.num_prompt_tokens,
            completion_tokens=num_tokens,
            time_to_first_token_s=command.time_to_first_token_s,
            total_s=command.total_s,
        )
        finished = Finished(
            request_id=choice.request_id,
            finish_reason=reason,
            text=choice.rest(),
            usage=usage,
            choice=choice.choice,
        )
        self._clients.update(choice.client, finished)

    def fail(self, command: commands.FailRequest) -> list[str]:
        """The machine's ids of the request's other texts, which cannot go on without this one."""
        choice = self._open.pop(command.request_id, None)
        if choice is None:
            return []
        self._clients.update(choice.client, Failed(request_id=choice.request_id, error=command.error))
        return self.of(choice.client.ref, request_id=choice.request_id)

    def _choice(self, message: Generate, choice: int, client: Recipient) -> OpenChoice:
        return OpenChoice.create(
            message.request_id,
            choice,
            client=client,
            codec=self._codec,
            sampling=message.sampling,
            generated_token_ids=message.generated_token_ids,
        )

    def _prompt_tokens(self, message: Generate) -> tuple[int, ...]:
        if (message.prompt is None) == (message.prompt_token_ids is None):
            raise Invalid("give either prompt or prompt_token_ids")
        token_ids = message.prompt_token_ids
        if token_ids is None:
            token_ids = self._codec.encode(message.prompt or "")
        _check_prompt(token_ids, self._model)
        return token_ids

    def _unique(self, request_id: str, sender: ActorRef) -> str:
        """Two clients may choose the same id; one client may not use it twice at once."""
        key = f"{sender.node}/{request_id}"
        if any(_choice_id(key, choice) in self._open for choice in range(MAX_CHOICES)):
            raise Invalid(f"request id {request_id!r} is in use; ids must be unique")
        return key


def _choice_id(key: str, choice: int) -> str:
    """The machine's id of one choice of a request."""
    return f"{key}#{choice}"


def _check_prompt(token_ids: tuple[int, ...], model: ModelInfo) -> None:
    """Raises Invalid for a prompt that the model cannot take."""
    if not token_ids:
        raise Invalid("the prompt is empty: give at least one token")
    if len(token_ids) >= model.max_context_len:
        raise Invalid(
            f"the prompt has {len(token_ids)} tokens; the model's context is {model.max_context_len},"
            f" so a prompt may have at most {model.max_context_len - 1}"
        )
    if max(token_ids) >= model.vocab_size:
        raise Invalid(f"token id {max(token_ids)} is outside the model's vocabulary of {model.vocab_size}")
