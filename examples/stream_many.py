"""Several prompts at once, streamed as they come, one of them cancelled halfway."""

import asyncio

import asyncpipe

PROMPTS = ("def add(", "class Stack", "import os\n\n")


async def follow(client: asyncpipe.Client, prompt: str) -> None:
    stream = client.stream(prompt, max_new_tokens=24, temperature=0.8, seed=1)
    async for piece in stream:
        if prompt.startswith("class") and piece.index == 8:
            await client.cancel(stream.request_id)
    result = stream.result
    print(f"{prompt!r}: {len(result.token_ids)} tokens, {result.finish_reason.value}: {result.text!r}")


async def main() -> None:
    async with asyncpipe.local(stages=2) as client:
        await asyncio.gather(*(follow(client, prompt) for prompt in PROMPTS))
        for stage in (await client.status()).stages:
            print(f"stage {stage.stage}: layers {stage.layers}, busy {stage.busy_share:.0%}")


asyncio.run(main())
