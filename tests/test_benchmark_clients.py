"""Every client of the benchmark does what is measured of it, against the embedded agent."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest

from anyagent import IM, OM, AgentError, ConnectError, Disconnected
from anyagent.testing import AgentReply, embedded_agent
from benchmarks import clients

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyagent.testing import EmbeddedAgent
    from benchmarks.clients._base import Adapter, Client

DEADLINE = 30  # seconds
LIBRARIES = {"aiohttp", "websockets", "picows", "httpx_ws", "trio_websocket"}

every_client = pytest.mark.parametrize("name", clients.NAMES)
every_router = pytest.mark.parametrize("name", [name for name in clients.NAMES if name != "replaced"])


async def counting(message: IM.UserMessage, reply: AgentReply) -> None:
    for number in range(20):
        await reply.text(f"{message.text}-{number} ")


def chunks_of(prompt: str) -> list[str]:
    return [f"{prompt}-{number} " for number in range(20)]


async def streamed(client: Client, prompt: str) -> list[str]:
    async with await client.send_message(prompt) as answer:
        return [event.text async for event in answer]


def serve(adapter: Adapter, main: Callable[[EmbeddedAgent], Awaitable[None]], **options: object) -> None:
    """Run `main` on the adapter's backend, beside an agent that speaks its wire."""
    options.setdefault("handler", counting)

    async def under_deadline(server: EmbeddedAgent) -> None:
        with anyio.fail_after(DEADLINE):
            await main(server)

    with embedded_agent(wire="native" if adapter.multiplexes else "single", **options) as server:  # type: ignore[arg-type]  # the options differ in type
        run(adapter, under_deadline, server)


def run(adapter: Adapter, main: Callable[[EmbeddedAgent], Awaitable[None]], server: EmbeddedAgent) -> None:
    if adapter.name == "trio-websocket":
        with warnings.catch_warnings():  # it leaves the socket open when the agent goes first
            warnings.simplefilter("ignore", ResourceWarning)
            anyio.run(main, server, backend="trio")
            gc.collect()
    elif adapter.backend == "trio":
        anyio.run(main, server, backend="trio")
    else:
        options = {"use_uvloop": adapter.backend == "uvloop"}
        anyio.run(main, server, backend="asyncio", backend_options=options)


@every_client
def test_a_streamed_answer_is_its_chunks_in_order_and_ends_by_itself(name: str) -> None:
    adapter = clients.load(name)

    async def main(server: EmbeddedAgent) -> None:
        async with adapter.connect(server.url) as client:
            for prompt in ("first", "second"):
                assert await streamed(client, prompt) == chunks_of(prompt)

    serve(adapter, main)


@every_client
def test_an_answer_that_was_asked_for_is_all_its_text(name: str) -> None:
    adapter = clients.load(name)

    async def main(server: EmbeddedAgent) -> None:
        async with adapter.connect(server.url) as client:
            for prompt in ("first", "second"):
                assert (await client.ask(prompt)).text == "".join(chunks_of(prompt))

    serve(adapter, main)


@every_router
def test_a_hundred_answers_at_once_do_not_meet(name: str) -> None:
    adapter = clients.load(name)
    answers: dict[str, list[str]] = {}
    replies: dict[str, str] = {}

    async def stream(client: Client, prompt: str) -> None:
        answers[prompt] = await streamed(client, prompt)

    async def ask(client: Client, prompt: str) -> None:
        replies[prompt] = (await client.ask(prompt)).text

    async def main(server: EmbeddedAgent) -> None:
        async with adapter.connect(server.url) as client, anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(stream, client, f"s{number}")
                tasks.start_soon(ask, client, f"a{number}")

    serve(adapter, main)
    assert answers == {f"s{number}": chunks_of(f"s{number}") for number in range(50)}
    assert replies == {f"a{number}": "".join(chunks_of(f"a{number}")) for number in range(50)}


@every_router
def test_leaving_early_tells_the_agent_and_leaves_the_other_answers_alone(name: str) -> None:
    adapter = clients.load(name)

    async def endless(message: IM.UserMessage, reply: AgentReply) -> None:
        await counting(message, reply)
        if message.text == "left":
            await reply.hang()

    async def main(server: EmbeddedAgent) -> None:
        async with adapter.connect(server.url) as client:
            kept = await client.send_message("kept")
            async with await client.send_message("left") as answer:
                async for event in answer:
                    assert event.text == "left-0 "
                    break
            sent = server.wait_for(
                lambda message: isinstance(message, IM.UserMessage) and message.text == "left"
            )
            await anyio.to_thread.run_sync(server.wait_for, lambda message: message == IM.Cancel(sent.id))
            async with kept:
                assert [event.text async for event in kept] == chunks_of("kept")
            assert await streamed(client, "later") == chunks_of("later")
            assert [type(message) for message in server.received].count(IM.Cancel) == 1

    serve(adapter, main, handler=endless)


@every_router
def test_an_error_of_the_agent_ends_its_answer(name: str) -> None:
    adapter = clients.load(name)

    async def failing(message: IM.UserMessage, reply: AgentReply) -> None:
        await reply.text("so far")
        await reply.error("broken", "on purpose")

    async def main(server: EmbeddedAgent) -> None:
        async with adapter.connect(server.url) as client:
            with pytest.raises((AgentError, RuntimeError), match="on purpose"):
                await streamed(client, "streamed")
            with pytest.raises((AgentError, RuntimeError), match="on purpose"):
                await client.ask("asked")

    serve(adapter, main, handler=failing)


@every_client
@pytest.mark.parametrize("how", ["closed", "dropped", "reset"])
def test_a_lost_connection_ends_waiting_answers_with_an_error(name: str, how: str) -> None:
    adapter = clients.load(name)
    requests = 20 if adapter.multiplexes else 1
    arrived: list[str] = []
    errors: list[Exception] = []

    async def losing(message: IM.UserMessage, reply: AgentReply) -> None:
        arrived.append(message.text)
        if len(arrived) == requests:  # so nothing is being sent any more
            match how:
                case "closed":
                    await reply.close(1001, "going away")
                case "dropped":
                    reply.drop()
                case _:
                    reply.reset()
        await reply.hang()

    async def stream(client: Client) -> None:
        try:
            await streamed(client, "streamed")
        except (Disconnected, ConnectionError) as exc:
            errors.append(exc)

    async def ask(client: Client) -> None:
        try:
            await client.ask("asked")
        except (Disconnected, ConnectionError) as exc:
            errors.append(exc)

    async def main(server: EmbeddedAgent) -> None:
        async with adapter.connect(server.url) as client:
            async with anyio.create_task_group() as tasks:
                for number in range(requests):
                    tasks.start_soon(ask if number % 2 else stream, client)
            with pytest.raises((Disconnected, ConnectionError)):
                await streamed(client, "too late")

    serve(adapter, main, handler=losing)
    assert len(errors) == requests


@every_client
@pytest.mark.parametrize(
    "first", [OM.EventEnd(tokens_used=0), OM.Error(code="full", details="come back later")]
)
def test_connecting_fails_unless_the_agent_sends_its_status_first(name: str, first: OM.ServerMessage) -> None:
    adapter = clients.load(name)

    async def main(server: EmbeddedAgent) -> None:
        with pytest.raises((ConnectError, ConnectionError, ExceptionGroup)) as caught:
            async with adapter.connect(server.url):
                raise AssertionError("it connected")
        exc: BaseException = caught.value
        while isinstance(exc, BaseExceptionGroup):  # the libraries' own task groups wrap
            (exc,) = exc.exceptions
        assert isinstance(exc, ConnectError | ConnectionError)

    serve(adapter, main, status=first)


@every_client
def test_loading_imports_no_library_but_its_own_and_names_what_it_needs(name: str) -> None:
    program = """
import importlib, importlib.metadata, sys
from benchmarks import clients
adapter = clients.load(sys.argv[1])
print(*sys.modules)
for module in adapter.modules:
    importlib.import_module(module)
for distribution in adapter.distributions:
    importlib.metadata.version(distribution)
assert adapter.name == sys.argv[1]
"""
    done = subprocess.run(
        [sys.executable, "-c", program, name], capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 0, done.stderr
    own = {"replaced": "aiohttp"}.get(name, name.removesuffix("-uvloop").replace("-", "_"))
    assert LIBRARIES & set(done.stdout.split()) == LIBRARIES & {own}


def test_an_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        clients.load("telepathy")
