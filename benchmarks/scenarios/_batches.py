"""The ways from a file of prompts to a file of answers: anyagent's own, and what one writes without it.

Those without it write to a buffered file, in the order in which the answers come. What they lack: a run that
ends half-way begins again from the start, nothing that was answered is safe until the file is closed, one
failure ends everything, nothing is tried again, and nothing is known of the run but the answers.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

    from ..clients._base import Adapter, Client

__all__ = ["Row", "ask_all", "ask_all_connecting", "ask_all_on_trio", "ask_in_turn", "run_engine"]


class Row(msgspec.Struct):
    """What a line of either file has in any case."""

    id: str
    text: str


_decode_row = msgspec.json.Decoder(Row).decode
_encode = msgspec.json.Encoder().encode


async def run_engine(url: str, source: Path, target: Path, in_flight: int | None) -> None:
    """anyagent's batch runner as it is; ``None``: as many in flight as it finds right."""
    # Only here: the other clients are not to have it in their processes.
    from anyagent.batch import BatchConfig
    from anyagent.batch._files.job import FileJob
    from anyagent.batch._files.run import FileRun

    config = BatchConfig(url) if in_flight is None else BatchConfig(url, in_flight=in_flight)
    await FileRun(FileJob(input=source, output=target, config=config)).run()


async def ask_all(adapter: Adapter, url: str, source: Path, target: Path, in_flight: int) -> None:
    """On asyncio: a task for each prompt, on one connection, which a semaphore lets send `in_flight`."""
    semaphore = asyncio.Semaphore(in_flight)

    async def answer(client: Client, row: Row, output: BinaryIO) -> None:
        async with semaphore:
            await _answer(client, row, output)

    with source.open("rb") as lines, target.open("wb") as output:
        async with adapter.connect(url) as client:
            await asyncio.gather(*(answer(client, row, output) for row in map(_decode_row, lines)))


async def ask_all_connecting(adapter: Adapter, url: str, source: Path, target: Path, in_flight: int) -> None:
    """As `ask_all`, with a connection for each prompt: no router, as little as one can write."""
    semaphore = asyncio.Semaphore(in_flight)

    async def answer(row: Row, output: BinaryIO) -> None:
        async with semaphore, adapter.connect(url) as client:
            await _answer(client, row, output)

    with source.open("rb") as lines, target.open("wb") as output:
        await asyncio.gather(*(answer(row, output) for row in map(_decode_row, lines)))


async def ask_all_on_trio(adapter: Adapter, url: str, source: Path, target: Path, in_flight: int) -> None:
    """As `ask_all`, with a nursery."""
    import trio  # only here, as above

    limiter = trio.CapacityLimiter(in_flight)

    async def answer(client: Client, row: Row, output: BinaryIO) -> None:
        async with limiter:
            await _answer(client, row, output)

    with source.open("rb") as lines, target.open("wb") as output:
        async with adapter.connect(url) as client, trio.open_nursery() as nursery:
            for row in map(_decode_row, lines):
                nursery.start_soon(answer, client, row, output)


async def _answer(client: Client, row: Row, output: BinaryIO) -> None:
    reply = await client.ask(row.text)
    output.write(_encode(Row(row.id, reply.text)) + b"\n")


async def ask_in_turn(adapter: Adapter, url: str, source: Path, target: Path, connections: int) -> None:
    """One prompt after the other on each of `connections`, with nothing but the standard library's JSON."""

    async def work(rows: Iterator[dict[str, str]], output: BinaryIO) -> None:
        async with adapter.connect(url) as client:
            for row in rows:
                reply = await client.ask(row["text"])
                output.write(json.dumps({"id": row["id"], "text": reply.text}).encode() + b"\n")

    with source.open("rb") as lines, target.open("wb") as output:
        rows = map(json.loads, lines)
        await asyncio.gather(*(work(rows, output) for _ in range(connections)))
