"""What burst, interleaved and size have in common: rounds of requests that are answered all together."""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, ClassVar, Final

import anyio
import msgspec

from anyagent import OM

from .. import wire
from ..results import Measurement
from ._base import FLOOR, ConnectedScenario, Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ..clients._base import Adapter, Client
    from ._base import Job

__all__ = ["SIZE", "RoundsScenario", "check", "play_round"]

SIZE: Final = 26
"""Bytes of text in a chunk, where a scenario does not vary it."""
_DECODED: Final = (
    OM.Status
    | OM.EventTextChunk
    | OM.EventReasoningChunk
    | OM.EventToolCall
    | OM.EventEnd
    | OM.Error
    | OM.GracefulDisconnect
)


def check(received: int, expected: int) -> None:
    """Raise `RuntimeError` unless all characters of an answer have arrived."""
    if received != expected:
        raise RuntimeError(f"{received} characters of an answer arrived instead of {expected}")


async def _stream(client: Client, prompt: str, size: int) -> None:
    received = 0
    async with await client.send_message(prompt) as answer:
        async for event in answer:
            received += len(event.text)
    check(received, size)


async def _collect(client: Client, prompt: str, size: int) -> None:
    check(len((await client.ask(prompt)).text), size)


async def play_round(
    client: Client,
    adapter: Adapter,
    requests: int,
    size: int,
    *,
    prompt: str = wire.PROMPT,
    collect: bool = False,
) -> None:
    """`requests` answers of `size` characters: at once, where the client can, each in a task of its own."""
    consume = _collect if collect else _stream
    if not adapter.multiplexes:
        for _ in range(requests):
            await consume(client, prompt, size)
        return
    async with anyio.create_task_group() as tasks:
        for _ in range(requests):
            tasks.start_soon(consume, client, prompt, size)


async def _play_held_round(
    client: Client, requests: int, size: int, watch: Stopwatch, *, collect: bool
) -> None:
    """As `play_round`, but measured only from the moment on at which all requests are in flight."""
    consume = _collect if collect else _stream
    async with anyio.create_task_group() as tasks:
        for _ in range(requests):
            tasks.start_soon(consume, client, wire.PROMPT, size)
        await client.ask(wire.READY)
        watch.start()
        await client.ask(wire.GO)
    watch.stop()


def _decode(messages: Iterable[bytes]) -> float:
    """CPU seconds for decoding `messages`."""
    decode: Callable[[bytes], object] = msgspec.json.Decoder(_DECODED).decode
    held = list(messages)
    for message in held[: len(held) // 10]:
        decode(message)
    gc.collect()
    start = time.process_time()
    for message in held:
        decode(message)
    return time.process_time() - start


class RoundsScenario(ConnectedScenario):
    """Rounds of `requests` answers of `chunks` chunks of `size`, after one of `warm` chunks to warm up.

    `held`: sending the prompts and starting the tasks is not measured, where the client can have many
    requests at a time.
    """

    held: ClassVar[bool] = False
    unit = "µs CPU per chunk"
    order: ClassVar[wire.Order] = "burst"
    pseudo_clients: ClassVar[Mapping[str, str]] = {FLOOR: "msgspec alone"}

    def collects(self, variant: str) -> bool:
        """Whether the clients collect whole answers in this variant, instead of streaming them."""
        return False

    async def measure(self, job: Job, adapter: Adapter, parameters: Mapping[str, int]) -> Measurement:
        requests, chunks, size = parameters["requests"], parameters["chunks"], parameters["size"]
        warm, rounds = parameters["warm"], parameters["rounds"]
        collect = self.collects(job.variant)
        held = self.held and adapter.multiplexes
        options = {"chunks": chunks, "warm": warm, "size": size, "order": self.order, "hold": int(held)}
        at_once = requests if adapter.multiplexes else 1
        watch = Stopwatch(job)
        async with self.connect(job, adapter, "round", requests=at_once, **options) as client:
            if held:
                await _play_held_round(client, requests, chunks * size, Stopwatch(job), collect=collect)
                for _ in range(rounds):
                    await _play_held_round(client, requests, chunks * size, watch, collect=collect)
            else:
                await play_round(client, adapter, requests, warm * size, prompt=wire.WARM_UP, collect=collect)
                with watch:
                    for _ in range(rounds):
                        await play_round(client, adapter, requests, chunks * size, collect=collect)
        total = rounds * requests * chunks
        return watch.measurement(
            watch.cpu / total * 1e6,
            chunks=total,
            wall_per_chunk=watch.wall / total * 1e6,
            mb_per_s=total * size / watch.wall / 1e6,
        )

    def measure_pseudo(self, job: Job, parameters: Mapping[str, int]) -> Measurement:
        requests, chunks, size = parameters["requests"], parameters["chunks"], parameters["size"]
        ids = tuple(str(number) for number in range(requests))
        total = parameters["rounds"] * requests * chunks
        messages = wire.round_messages
        cpu = sum(_decode(messages(ids, chunks, size, self.order)) for _ in range(parameters["rounds"]))
        return Measurement(cpu / total * 1e6, None, {"chunks": total})
