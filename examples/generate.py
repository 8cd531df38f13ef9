"""Five lines: the bundled model on two stages, in child processes of this one."""

import asyncio

import asyncpipe


async def main() -> None:
    async with asyncpipe.local(stages=2) as client:
        result = await client.generate("import ", max_new_tokens=32)
        print(result.text)


asyncio.run(main())
