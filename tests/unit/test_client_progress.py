"""What a client asks of the coordinator that comes after a lost one."""

from __future__ import annotations

from asyncpipe.client.progress import Progress
from asyncpipe.wire.messages import Accepted, Generate, Piece, PromptScored, Sampling, TokenLogprobs

SCORES = tuple(TokenLogprobs(7, -0.5, rank) for rank in (1, 2, 3, 4))
REQUEST = Generate(request_id="r", prompt="Once", sampling=Sampling(temperature=0.5, prompt_logprobs=0))
ACCEPTED = Accepted(request_id="r", prompt_token_ids=(5, 6, 7, 8, 9), seed=11)


def scored(first: int, last: int) -> PromptScored:
    return PromptScored(request_id="r", logprobs=SCORES[first:last])


def test_before_it_was_accepted_the_request_is_sent_as_it_was() -> None:
    assert Progress(REQUEST).rest(deadline_s=1.0) is REQUEST


def test_the_rest_has_the_same_seed_and_the_tokens_so_far() -> None:
    progress = Progress(REQUEST)
    for event in (
        ACCEPTED,
        Piece(request_id="r", index=0, token_id=21, text="x"),
        Piece(request_id="r", index=1, token_id=22, text=""),
    ):
        assert progress.note(event) is event
    rest = progress.rest(deadline_s=1.5)
    assert (rest.prompt, rest.prompt_token_ids, rest.generated_token_ids) == (None, (5, 6, 7, 8, 9), (21, 22))
    assert (rest.sampling.seed, rest.sampling.temperature, rest.deadline_s) == (11, 0.5, 1.5)


def test_scores_of_the_prompt_that_come_again_are_left_out() -> None:
    progress = Progress(REQUEST)
    progress.note(ACCEPTED)
    assert progress.note(scored(0, 2)) == scored(0, 2)
    progress.note(ACCEPTED)
    assert progress.note(scored(0, 1)) is None
    assert progress.note(scored(1, 3)) == scored(2, 3)
    assert progress.note(scored(3, 4)) == scored(3, 4)
