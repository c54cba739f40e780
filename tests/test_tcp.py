"""TCP on asyncio: read ahead within a bound, and nothing lost, whatever is cancelled, closed or reset."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import socket
import stat
import struct
import threading
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anyagent._transports import READ_SIZE, tcp
from anyagent._transports.tcp import connect_tcp

from .properties import REPEATABLE
from .test_transport_leaks import no_garbage_collection
from .wire_server import DEADLINE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator

    from anyagent._transports.tcp import TCPStream

    Operation: TypeAlias = Callable[[], Coroutine[Any, Any, object]]
    Cancelled: TypeAlias = Callable[[Operation], Awaitable[None]]

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.sockets,
    pytest.mark.parametrize("anyio_backend", ["asyncio", "uvloop"], indirect=True),
]

MUCH: Final = bytes(range(251)) * 40_000
"""10 MB, more than any buffer on the way holds; no power of two is a period of it."""


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[TCPStream, socket.socket]]:
    """A stream and the blocking socket at its other end, with little room in the kernel between them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stream = await connect_tcp(*listener.getsockname())
        peer, _ = listener.accept()
    with peer:
        peer.settimeout(DEADLINE)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ours = stream._transport.get_extra_info("socket")
        for sock, option in itertools.product((ours, peer), (socket.SO_RCVBUF, socket.SO_SNDBUF)):
            sock.setsockopt(socket.SOL_SOCKET, option, 64 * 1024)
        try:
            yield stream, peer
        finally:
            await anyio.aclose_forcefully(stream)


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop turn until `condition` holds."""
    while not condition():
        await anyio.lowlevel.checkpoint()


async def send(stream: TCPStream, peer: socket.socket, data: bytes) -> None:
    """Let `data`, a little, arrive while nobody receives."""
    expected = len(stream._arrived) + len(data)
    peer.sendall(data)
    await until(lambda: len(stream._arrived) == expected)


def reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


@contextlib.asynccontextmanager
async def in_a_thread(function: Callable[..., object], *args: object) -> AsyncIterator[threading.Event]:
    """Run a blocking function beside the block, which waits for its end; the event says that it has ended."""
    ended = threading.Event()

    def run() -> None:
        function(*args)
        ended.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, run)
        yield ended


def receive_all(peer: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        data = peer.recv(1 << 20)
        assert data, "the client has closed its socket"
        received += data
    return bytes(received)


# Receiving


async def test_what_arrives_while_nobody_receives_comes_as_one() -> None:
    async with connected() as (stream, peer):
        await send(stream, peer, b"one, ")
        await send(stream, peer, b"two")
        assert await stream.receive() == b"one, two"


async def test_a_receiver_that_waits_is_given_what_arrives() -> None:
    received: list[bytes] = []

    async def receive() -> None:
        received.append(await stream.receive())

    async with connected() as (stream, peer):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            peer.sendall(b"hello")
        assert received == [b"hello"]


async def test_no_more_is_returned_than_was_asked_for_and_the_rest_comes_next() -> None:
    async with connected() as (stream, peer):
        await send(stream, peer, b"abcdefghi")
        assert [await stream.receive(4) for _ in range(3)] == [b"abcd", b"efgh", b"i"]


async def test_a_peer_that_nobody_receives_from_is_held_back_and_all_it_says_arrives_in_order() -> None:
    async with connected() as (stream, peer), in_a_thread(peer.sendall, MUCH) as sent:
        await until(lambda: not stream._reading)
        assert READ_SIZE <= len(stream._arrived) < 2 * READ_SIZE
        for _ in range(100):
            await anyio.lowlevel.checkpoint()
        assert len(stream._arrived) < 2 * READ_SIZE
        assert not sent.is_set()
        received = bytearray()
        while len(received) < len(MUCH):
            data = await stream.receive()
            assert 0 < len(data) <= READ_SIZE
            received += data
            assert len(stream._arrived) < 2 * READ_SIZE
        assert received == MUCH


async def test_a_receiver_of_a_few_bytes_at_a_time_makes_the_stream_read_no_further_ahead() -> None:
    async with connected() as (stream, peer), in_a_thread(peer.sendall, MUCH):
        await until(lambda: not stream._reading)
        received = bytearray()
        for _ in range(20):
            received += await stream.receive(1)
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            assert len(stream._arrived) < 2 * READ_SIZE
        while len(received) < len(MUCH):
            received += await stream.receive()
        assert received == MUCH


async def test_a_second_receiver_at_a_time_is_refused_and_the_first_one_goes_on() -> None:
    received: list[bytes] = []

    async def receive() -> None:
        received.append(await stream.receive())

    async with connected() as (stream, peer):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            with anyio.fail_after(1), pytest.raises(anyio.BusyResourceError):
                await stream.receive()
            peer.sendall(b"hello")
        assert received == [b"hello"]


async def cancelled_by_a_scope(operation: Operation) -> None:
    """Start `operation`, let it wait, and cancel it."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(operation)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()


async def cancelled_natively(operation: Operation) -> None:
    """The same."""
    task = asyncio.ensure_future(operation())
    await anyio.wait_all_tasks_blocked()
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


each_cancellation = pytest.mark.parametrize("cancelled", [cancelled_by_a_scope, cancelled_natively])


@each_cancellation
async def test_a_cancelled_receiver_loses_nothing(cancelled: Cancelled) -> None:
    async with connected() as (stream, peer):
        await cancelled(stream.receive)
        await send(stream, peer, b"later")
        await cancelled(lambda: stuck_behind(stream))
        await send(stream, peer, b" on")
        assert await stream.receive() == b"later on"


async def stuck_behind(stream: TCPStream) -> None:
    """Begin to receive only once cancelled, where there is something to receive."""
    try:
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await stream.receive()
        assert scope.cancelled_caught


@pytest.mark.parametrize("cancelled_first", [False, True])
async def test_a_receiver_cancelled_in_the_very_turn_of_an_arrival_loses_nothing(
    cancelled_first: bool,
) -> None:
    async with connected() as (stream, peer):
        task = asyncio.ensure_future(stream.receive())
        await anyio.wait_all_tasks_blocked()
        if cancelled_first:
            task.cancel()
        stream.get_buffer(-1)[:5] = b"hello"  # as the event loop does
        stream.buffer_updated(5)
        if not cancelled_first:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await send(stream, peer, b", you")
        assert await stream.receive() == b"hello, you"


# The end


@pytest.mark.parametrize("waiting", [False, True])
async def test_what_was_said_before_a_fin_is_delivered_before_the_end_which_stays(waiting: bool) -> None:
    received: list[bytes] = []

    async def receive() -> None:
        received.append(await stream.receive())
        for _ in range(3):
            with pytest.raises(anyio.EndOfStream):
                await stream.receive()

    async with connected() as (stream, peer), anyio.create_task_group() as tasks:
        if waiting:
            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
        peer.sendall(b"farewell")
        await until(lambda: stream._arrived or received)
        await anyio.wait_all_tasks_blocked()
        peer.shutdown(socket.SHUT_WR)
        if not waiting:
            await until(lambda: stream._ended)
            await receive()
    assert received == [b"farewell"]


async def test_after_the_peers_fin_it_still_can_be_sent_to() -> None:
    async with connected() as (stream, peer):
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
        async with in_a_thread(receive_all, peer, len(MUCH)):
            await stream.send(MUCH)


async def test_a_fin_behind_more_than_is_read_ahead_comes_behind_all_of_it() -> None:
    def say_much() -> None:
        peer.sendall(MUCH)
        peer.shutdown(socket.SHUT_WR)

    async with connected() as (stream, peer), in_a_thread(say_much):
        await until(lambda: not stream._reading)
        received = bytearray()
        with contextlib.suppress(anyio.EndOfStream):
            while len(received) <= len(MUCH):
                received += await stream.receive()
        assert received == MUCH


async def test_what_had_arrived_before_a_reset_is_delivered_before_the_error_which_stays() -> None:
    async with connected() as (stream, peer):
        await send(stream, peer, b"farewell")
        reset(peer)
        await until(lambda: stream._failure)
        assert await stream.receive(4) == b"fare"
        assert await stream.receive(100) == b"well"
        for _ in range(3):
            with pytest.raises(anyio.BrokenResourceError) as caught:
                await stream.receive()
            assert isinstance(caught.value.__cause__, ConnectionResetError)
        with pytest.raises(anyio.BrokenResourceError):
            await stream.send(b"x")


async def test_a_reset_wakes_a_receiver_that_waits() -> None:
    async def receive() -> None:
        with pytest.raises(anyio.BrokenResourceError):
            await stream.receive()

    async with connected() as (stream, peer), anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        reset(peer)


# Sending


async def test_sending_waits_for_a_peer_that_does_not_read_and_goes_on_when_it_does() -> None:
    returned = False

    async def send_much() -> None:
        nonlocal returned
        await stream.send(MUCH)
        returned = True

    async with connected() as (stream, peer):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send_much)
            await anyio.wait_all_tasks_blocked()
            assert not returned
            assert await anyio.to_thread.run_sync(receive_all, peer, len(MUCH)) == MUCH
        assert returned


@each_cancellation
async def test_sending_to_a_peer_that_does_not_read_can_be_cancelled(
    cancelled: Cancelled,
) -> None:
    async with connected() as (stream, peer):
        await cancelled(lambda: stream.send(MUCH))
        peer.sendall(b"still there")
        assert await stream.receive() == b"still there"


async def test_a_sender_that_waits_learns_that_the_connection_is_lost() -> None:
    async def send_much() -> None:
        with pytest.raises(anyio.BrokenResourceError) as caught:
            await stream.send(MUCH)
        assert isinstance(caught.value.__cause__, ConnectionError)

    async with connected() as (stream, peer), anyio.create_task_group() as tasks:
        tasks.start_soon(send_much)
        await anyio.wait_all_tasks_blocked()
        reset(peer)


async def test_the_end_of_what_is_sent_can_be_told_while_receiving_goes_on() -> None:
    async with connected() as (stream, peer):
        await stream.send(b"that is all")
        await stream.send_eof()
        assert await anyio.to_thread.run_sync(receive_all, peer, 11) == b"that is all"
        assert await anyio.to_thread.run_sync(peer.recv, 1) == b""
        peer.sendall(b"thanks")
        assert await stream.receive() == b"thanks"


# Closing


async def test_closing_wakes_a_receiver_and_a_sender_that_wait() -> None:
    async def expect_closed(operation: Callable[..., Awaitable[object]], *args: object) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await operation(*args)

    async with connected() as (stream, _), anyio.create_task_group() as tasks:
        tasks.start_soon(expect_closed, stream.receive)
        tasks.start_soon(expect_closed, stream.send, MUCH)
        await anyio.wait_all_tasks_blocked()
        await stream.aclose()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_after_closing_nothing_can_be_sent_or_received_and_the_peer_knows(cancelled: bool) -> None:
    async with connected() as (stream, peer):
        for _ in range(2):
            with anyio.CancelScope() as scope:
                if cancelled:
                    scope.cancel()
                await stream.aclose()
            assert scope.cancelled_caught == cancelled
        with pytest.raises(anyio.ClosedResourceError):
            await stream.send(b"x")
        with pytest.raises(anyio.ClosedResourceError):
            await stream.receive()
        assert await anyio.to_thread.run_sync(peer.recv, 1) == b""


async def test_closing_after_a_reset_or_with_much_unread_leaves_the_event_loop_in_peace() -> None:
    async with connected() as (stream, peer), in_a_thread(send_until_gone, peer):
        await until(lambda: not stream._reading)
        await stream.aclose()
    async with connected() as (stream, peer):
        reset(peer)
        await until(lambda: stream._failure)
        await stream.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await stream.receive()


def send_until_gone(peer: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            peer.sendall(MUCH)


# Connecting


async def test_a_refused_connection_is_an_os_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
    with pytest.raises(ConnectionRefusedError):
        await connect_tcp(host, port)


async def test_a_name_that_cannot_be_resolved_is_an_os_error() -> None:
    with pytest.raises(socket.gaierror):
        await connect_tcp("name.invalid", 80)


async def test_localhost_is_connected_to_where_the_listener_knows_ipv4_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def two_addresses(*_: object, **__: object) -> list[tuple[Any, ...]]:
        kind = socket.SOCK_STREAM, socket.IPPROTO_TCP, ""
        return [(socket.AF_INET6, *kind, ("::1", port, 0, 0)), (socket.AF_INET, *kind, ("127.0.0.1", port))]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        # Not every machine's localhost is both; uvloop may resolve the name without this.
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", two_addresses)
        stream = await connect_tcp("localhost", port)
        peer, _ = listener.accept()
        with peer:
            await stream.send(b"hello")
            assert await anyio.to_thread.run_sync(receive_all, peer, 5) == b"hello"
            peer.sendall(b"you")
            assert await stream.receive() == b"you"
            await stream.aclose()


def sockets() -> set[int]:
    """The inodes of this process' sockets."""
    found = set()
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # it is closed by now
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found.add(status.st_ino)
    return found


def accept_and_close(listener: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        listener.accept()[0].close()


@each_cancellation
async def test_a_connection_that_nobody_accepts_can_be_cancelled_and_leaves_no_socket(
    cancelled: Cancelled,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as first:
        listener.listen(0)
        first.connect(listener.getsockname())  # and the backlog is full
        before = sockets()
        with no_garbage_collection():
            await cancelled(lambda: connect_tcp(*listener.getsockname()))
            await until(lambda: sockets() <= before)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("natively", [False, True])
async def test_cancelling_at_any_turn_of_connecting_leaves_no_socket(host: str, natively: bool) -> None:
    ends: set[bool] = set()

    async def connect() -> None:
        stream = None
        try:
            stream = await connect_tcp(host, port)
            connected.set()
            await anyio.sleep_forever()
        finally:
            ends.add(stream is not None)
            if stream is not None:
                await anyio.aclose_forcefully(stream)

    with socket.create_server(("127.0.0.1", 0)) as listener, no_garbage_collection():
        listener.setblocking(False)
        port = listener.getsockname()[1]
        before = sockets()
        for turns in (*range(40), None):  # a thread looks the name up, which takes as long as it takes
            connected = anyio.Event()
            async with anyio.create_task_group() as tasks:
                task = asyncio.ensure_future(connect()) if natively else None
                if task is None:
                    tasks.start_soon(connect)
                if turns is None:
                    await connected.wait()
                for _ in range(turns or 0):
                    await anyio.lowlevel.checkpoint()
                if task is None:
                    tasks.cancel_scope.cancel()
                else:
                    task.cancel()
                    await asyncio.wait([task])
                    task = None
            for _ in range(20):  # the event loop closes what it has been told to, and so does a thread
                await anyio.lowlevel.checkpoint()
                accept_and_close(listener)
            leaked = sockets() - before
            assert not leaked, f"cancelled after {turns} turns"
    assert ends == {False, True}


# Both ways at once

LARGE: Final = bytes(range(253)) * 80_000
"""20 MB."""

sizes = st.lists(st.integers(1, 100) | st.integers(1, 2 * READ_SIZE), max_size=30)


def pieces(lengths: list[int]) -> Iterator[memoryview]:
    """`LARGE` in pieces of these lengths, and then the rest as one."""
    ends = [end for end in itertools.accumulate(lengths) if end < len(LARGE)]
    for start, end in itertools.pairwise([0, *ends, len(LARGE)]):
        yield memoryview(LARGE)[start:end]


# The fixture only names the backend.
@settings(REPEATABLE, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ours=sizes, theirs=sizes, reads=st.lists(st.integers(1, 2 * READ_SIZE), min_size=1, max_size=5))
async def test_much_that_is_written_both_ways_at_once_in_any_pieces_arrives_byte_by_byte(
    ours: list[int], theirs: list[int], reads: list[int]
) -> None:
    heard: list[bytes] = []

    def write() -> None:
        for piece in pieces(theirs):
            peer.sendall(piece)

    async def send_all() -> None:
        for piece in pieces(ours):
            await stream.send(bytes(piece))

    with anyio.fail_after(DEADLINE):
        async with connected() as (stream, peer):
            async with (
                in_a_thread(write),
                in_a_thread(lambda: heard.append(receive_all(peer, len(LARGE)))),
                anyio.create_task_group() as tasks,
            ):
                tasks.start_soon(send_all)
                received = bytearray()
                for max_bytes in itertools.chain(reads, itertools.repeat(READ_SIZE)):
                    if len(received) == len(LARGE):
                        break
                    data = await stream.receive(max_bytes)
                    assert len(data) <= max_bytes
                    received += data
            assert received == LARGE
            assert heard == [LARGE]


async def test_of_two_attempts_that_succeed_at_once_one_is_kept_and_the_other_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = asyncio.Event()
    made: list[TCPStream] = []

    async def twice(*_: object, **__: object) -> list[tuple[Any, ...]]:
        return 2 * [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", listener.getsockname())]

    async def create_connection(*args: Any) -> tuple[object, TCPStream]:
        transport, stream = await create(*args)
        made.append(stream)
        if len(made) == 2:
            both.set()
        await both.wait()
        return transport, stream

    loop = asyncio.get_running_loop()
    create: Callable[..., Awaitable[tuple[object, TCPStream]]] = loop.create_connection
    monkeypatch.setattr(tcp, "_ATTEMPT_DELAY", 0)
    monkeypatch.setattr(loop, "getaddrinfo", twice)
    monkeypatch.setattr(loop, "create_connection", create_connection)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        before = sockets()
        async with await connect_tcp(*listener.getsockname()) as stream:
            assert len(made) == 2
            assert stream in made
            (other,) = [each for each in made if each is not stream]
            await until(lambda: other._closed and other._ended)
        for _ in made:
            listener.accept()[0].close()
        await until(lambda: sockets() <= before)


async def test_a_failed_connect_leaves_no_reference_cycle() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _, port = listener.getsockname()
    with no_garbage_collection():
        with contextlib.suppress(ConnectionRefusedError):
            await connect_tcp("127.0.0.1", port)
        await until(lambda: not any(type(each) is ConnectionRefusedError for each in gc.get_objects()))
