"""Batch: what a prompt costs from a file of prompts to a file of answers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec

from .. import clients, wire
from . import _batches
from ._base import ConnectedScenario, Stopwatch, Variant
from ._rounds import SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..clients._base import Adapter
    from ..results import Measurement
    from ._base import Job

__all__ = ["Batch"]

_IN_FLIGHT: Final = 256
_CONNECTIONS: Final = 16  # of the client that has one request at a time on each
_ADAPTIVE: Final = "anyagent-adaptive"
_CONNECTING: Final = "aiohttp-connecting"
_SEVERAL: Final = f"replaced-{_CONNECTIONS}"
_CLIENTS: Final = {_ADAPTIVE: "anyagent-asyncio", _CONNECTING: "aiohttp", _SEVERAL: "replaced"}


class Batch(ConnectedScenario):
    """JSONL to JSONL: `prompts` prompts, an answer of `chunks` chunks for each; `warm` of them to warm up.

    All of it is measured, opening and closing of the files and of the connection included. A library is used
    as one uses it who has no batch runner (see `_batches`), which for aiohttp is ``asyncio.gather`` with a
    semaphore, over its router. Afterwards the output is checked. Extra: ``prompts_per_s``.
    """

    name = "batch"
    title = "from a file of prompts to a file of answers; 256 in flight, chunks come in turn"
    unit = "µs CPU per prompt"
    pseudo_clients: ClassVar[Mapping[str, str]] = {
        _ADAPTIVE: "anyagent (asyncio), adaptive",
        _CONNECTING: "aiohttp + msgspec, a connection for each prompt",
        _SEVERAL: f"aiohttp + pydantic, {_CONNECTIONS} connections",
    }
    shown: ClassVar[Mapping[str, str]] = {"prompts_per_s": "prompts/s"}
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant(
            "long",
            {"requests": _IN_FLIGHT, "prompts": 3000, "chunks": 200, "warm": 300},
            {"requests": _IN_FLIGHT, "prompts": 300, "chunks": 20, "warm": 10},
            seconds=4.5,
        ),
        Variant("short", {"requests": _IN_FLIGHT, "prompts": 8000, "chunks": 20, "warm": 300}, seconds=2.0),
    )

    def measure_pseudo(self, job: Job, parameters: Mapping[str, int]) -> Measurement:
        return self.measure_client(job, clients.load(_CLIENTS[job.client]), parameters)

    async def measure(self, job: Job, adapter: Adapter, parameters: Mapping[str, int]) -> Measurement:
        chunks, prompts = parameters["chunks"], _prompts(parameters["prompts"])
        kind = "ids" if adapter.multiplexes else "single"
        url = f"ws://127.0.0.1:{job.port}/{kind}/answer?chunks={chunks}&size={SIZE}"
        with tempfile.TemporaryDirectory() as directory:
            source, target, warm = (Path(directory, f"{name}.jsonl") for name in ("source", "target", "warm"))
            _write(prompts[: parameters["warm"]], source)
            await _run(job.client, adapter, url, source, warm)
            _write(prompts, source)
            with Stopwatch(job) as watch:
                await _run(job.client, adapter, url, source, target)
            _check(target, prompts, chunks)
        total = len(prompts)
        return watch.measurement(watch.cpu / total * 1e6, prompts=total, prompts_per_s=total / watch.wall)


async def _run(client: str, adapter: Adapter, url: str, source: Path, target: Path) -> None:
    if client.startswith("anyagent"):
        await _batches.run_engine(url, source, target, None if client == _ADAPTIVE else _IN_FLIGHT)
    elif client == _CONNECTING:
        await _batches.ask_all_connecting(adapter, url, source, target, _IN_FLIGHT)
    elif not adapter.multiplexes:
        connections = _CONNECTIONS if client == _SEVERAL else 1
        await _batches.ask_in_turn(adapter, url, source, target, connections)
    elif adapter.backend == "trio":
        await _batches.ask_all_on_trio(adapter, url, source, target, _IN_FLIGHT)
    else:
        await _batches.ask_all(adapter, url, source, target, _IN_FLIGHT)


def _prompts(count: int) -> list[_batches.Row]:
    """Prompts whose first `SIZE` characters differ."""
    return [_batches.Row(f"row-{n}", f"Prompt {n:07}: {wire.PROMPT} How are you?") for n in range(count)]


def _write(prompts: Sequence[_batches.Row], path: Path) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(prompt) + b"\n" for prompt in prompts))


def _check(path: Path, prompts: Sequence[_batches.Row], chunks: int) -> None:
    """Raise `RuntimeError` unless every prompt has its own answer in the file, whole and once."""
    expected = {prompt.id: prompt.text for prompt in prompts}
    with path.open("rb") as lines:
        for line in lines:
            row = msgspec.json.decode(line, type=_batches.Row)
            text = expected.pop(row.id, None)
            if text is None:
                raise RuntimeError(f"{row.id} was answered twice, or not asked")
            if row.text != wire.echo(text, SIZE) * chunks:
                raise RuntimeError(f"{row.id} has an answer that is not its own, or not whole")
    if expected:
        raise RuntimeError(f"{len(expected)} prompts were not answered")
