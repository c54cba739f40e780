"""The proxy does to a connection what each fault says, and nothing else."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from .proxy import (
    DEADLINE,
    Coalesce,
    Cut,
    Delay,
    Direction,
    Fault,
    Faults,
    Flip,
    HalfClose,
    Proxy,
    Reset,
    Split,
    Stall,
    Throttle,
    proxy_to,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TEXT = bytes(range(100))


class Ends:
    """The two ends of a connection through a proxy."""

    def __init__(self, proxy: Proxy, client: socket.socket, agent: socket.socket) -> None:
        self.proxy = proxy
        self.client = client
        self.agent = agent
        for end in (client, agent):
            end.settimeout(DEADLINE)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self.client.close()
        self.agent.close()
        self.proxy.wait_idle()


@contextlib.contextmanager
def connected(faults: Faults) -> Iterator[Ends]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE)
        with proxy_to(listener.getsockname()[1], faults) as proxy:
            port = int(proxy.url.rpartition(":")[2].strip("/"))
            client = socket.create_connection(("127.0.0.1", port))
            agent, _ = listener.accept()
            with client, agent:
                yield Ends(proxy, client, agent)


@contextlib.contextmanager
def one_way(way: str, *faults: Fault) -> Iterator[tuple[Ends, socket.socket, socket.socket]]:
    """A connection with `faults` in the direction `way`; the end that sends that way, and the other one."""
    with connected(Faults(to_agent=faults) if way == "to agent" else Faults(to_client=faults)) as ends:
        sender, receiver = (ends.client, ends.agent) if way == "to agent" else (ends.agent, ends.client)
        yield ends, sender, receiver


def receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        assert more, f"the stream has ended after {data!r}"
        data += more
    return data


def rest(sock: socket.socket) -> bytes:
    data = b""
    while more := sock.recv(65_536):
        data += more
    return data


each_way = pytest.mark.parametrize("way", ["to agent", "to client"])


@each_way
def test_without_faults_everything_is_forwarded_and_so_is_the_end(way: str) -> None:
    with one_way(way) as (ends, sender, receiver):
        large = 20_000 * TEXT
        writer = threading.Thread(target=sender.sendall, args=[large])
        writer.start()
        assert receive(receiver, len(large)) == large
        writer.join()
        receiver.sendall(b"back")
        assert receive(sender, 4) == b"back"
        sender.shutdown(socket.SHUT_WR)
        assert rest(receiver) == b""
        receiver.sendall(b"still")
        assert receive(sender, 5) == b"still"
        ends.close()
    (connection,) = ends.proxy.connections
    sent, returned = connection.to_agent.forwarded, connection.to_client.forwarded
    assert (sent, returned)[:: 1 if way == "to agent" else -1] == (large, b"backstill")


@each_way
def test_a_reset_of_one_end_is_passed_on_to_the_other(way: str) -> None:
    with one_way(way) as (ends, sender, receiver):
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sender.close()
        with pytest.raises(ConnectionResetError):
            rest(receiver)
        ends.close()


@each_way
@pytest.mark.parametrize("after", [0, 1, 42, 100])
def test_a_cut_ends_both_streams_after_so_many_bytes(way: str, after: int) -> None:
    with one_way(way, Cut(after)) as (ends, sender, receiver):
        if after:
            receiver.sendall(b"back")
            assert receive(sender, 4) == b"back"
            sender.sendall(TEXT)
        assert rest(receiver) == TEXT[:after]
        assert rest(sender) == b""
        receiver.sendall(b"too late")
        ends.close()
        assert b"".join(each.forwarded for each in directions(ends.proxy)) in (
            TEXT[:after] + b"back" * bool(after),
            b"back" * bool(after) + TEXT[:after],
        )


def directions(proxy: Proxy) -> list[Direction]:
    (connection,) = proxy.connections
    return [connection.to_agent, connection.to_client]


@each_way
@pytest.mark.parametrize("after", [0, 1, 42, 100])
def test_a_reset_resets_both_streams_after_so_many_bytes(way: str, after: int) -> None:
    with one_way(way, Reset(after)) as (ends, sender, receiver):
        if after:
            sender.sendall(TEXT)
            assert receive(receiver, after) == TEXT[:after]
        for end in (sender, receiver):
            with pytest.raises(ConnectionResetError):
                rest(end)
        ends.close()


@each_way
@pytest.mark.parametrize("after", [0, 42])
def test_a_half_close_ends_one_direction_and_leaves_the_other(way: str, after: int) -> None:
    with one_way(way, HalfClose(after)) as (ends, sender, receiver):
        sender.sendall(TEXT)
        assert rest(receiver) == TEXT[:after]
        for _ in range(3):
            receiver.sendall(TEXT)
            assert receive(sender, 100) == TEXT
            sender.sendall(TEXT)  # thrown away
        ends.close()


@each_way
@pytest.mark.parametrize("after", [0, 42])
def test_a_stall_forwards_nothing_more_in_one_direction_and_tells_nobody(way: str, after: int) -> None:
    with one_way(way, Stall(after)) as (ends, sender, receiver):
        sender.sendall(TEXT)
        assert receive(receiver, after) == TEXT[:after]
        for _ in range(3):
            receiver.sendall(TEXT)
            assert receive(sender, 100) == TEXT
            sender.sendall(TEXT)
        receiver.setblocking(False)
        with pytest.raises(BlockingIOError):
            receiver.recv(1)
        sender.close()
        receiver.settimeout(DEADLINE)
        with pytest.raises(ConnectionResetError):  # by then it can be told
            receiver.recv(1)
        ends.close()


def send_for_ever(sock: socket.socket) -> None:
    while True:
        sock.send(1_000_000 * b"x")


@each_way
def test_a_stalled_direction_fills_up(way: str) -> None:
    with one_way(way, Stall(0)) as (ends, sender, _):
        sender.setblocking(False)
        with pytest.raises(BlockingIOError):
            send_for_ever(sender)
        assert all(direction.writes == [] for direction in directions(ends.proxy))


@each_way
@pytest.mark.parametrize(("at", "bit", "flipped"), [(0, 0, 1), (5, 7, 0x85), (99, 1, 97)])
def test_a_flip_changes_one_bit(way: str, at: int, bit: int, flipped: int) -> None:
    with one_way(way, Flip(at, bit)) as (ends, sender, receiver):
        for byte in TEXT:
            sender.sendall(bytes((byte,)))
        changed = bytearray(TEXT)
        changed[at] = flipped
        assert receive(receiver, 100) == changed
        ends.close()


@each_way
@pytest.mark.parametrize("faults", [(Split(), Flip(3, 0)), (Flip(3, 0), Split())])
def test_a_split_writes_single_bytes_also_together_with_a_flip(way: str, faults: tuple[Fault, ...]) -> None:
    with one_way(way, *faults) as (ends, sender, receiver):
        sender.sendall(TEXT)
        changed = TEXT[:3] + b"\2" + TEXT[4:]
        assert receive(receiver, 100) == changed
        ends.close()
        assert [bytes((byte,)) for byte in changed] in [each.writes for each in directions(ends.proxy)]


@each_way
def test_coalescing_makes_a_few_writes_of_what_came_in_many_reads(way: str) -> None:
    with one_way(way, Coalesce(quiet=0.05)) as (ends, sender, receiver):
        for byte in TEXT:
            sender.sendall(bytes((byte,)))
        sender.shutdown(socket.SHUT_WR)
        assert rest(receiver) == TEXT
        ends.close()
        writes = [write for each in directions(ends.proxy) for write in each.writes]
        assert b"".join(writes) == TEXT
        assert len(writes) <= 5  # one, unless this thread was held up


def took(action: Callable[[], object]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


@each_way
def test_a_delay_lets_nothing_through_before_its_time(way: str) -> None:
    with one_way(way, Delay(0.05)) as (ends, sender, receiver):
        sender.sendall(TEXT)
        assert took(lambda: receive(receiver, 100)) >= 0.04  # it was sent a moment before
        receiver.sendall(TEXT)
        assert receive(sender, 100) == TEXT
        ends.close()


@each_way
def test_a_throttle_lets_no_more_through_than_its_rate(way: str) -> None:
    with one_way(way, Throttle(1_000)) as (ends, sender, receiver):
        sender.sendall(TEXT)
        assert took(lambda: receive(receiver, 100)) >= 0.09
        ends.close()
        assert [[len(write) for write in each.writes] for each in directions(ends.proxy) if each.writes] == [
            10 * [10]
        ]


def test_of_several_ends_the_first_counts_and_each_connection_has_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE)
        faults = [Faults(to_agent=(Cut(5), Cut(2))), Faults(to_agent=(Cut(3),))]
        with proxy_to(listener.getsockname()[1], *faults) as proxy:
            port = int(proxy.url.rpartition(":")[2].strip("/"))
            for count in (2, 3, 100):
                with socket.create_connection(("127.0.0.1", port)) as client:
                    agent, _ = listener.accept()
                    with agent:
                        client.sendall(TEXT)
                        client.shutdown(socket.SHUT_WR)
                        assert rest(agent) == TEXT[:count]
            proxy.wait_idle()
        assert [len(connection.to_agent.forwarded) for connection in proxy.connections] == [2, 3, 100]


def test_without_an_agent_the_client_is_reset_and_the_proxy_lives_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with proxy_to(port) as proxy:
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", int(proxy.url[:-1].rpartition(":")[2]))) as client:
                client.settimeout(DEADLINE)
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
        proxy.wait_idle()


def test_stopping_ends_a_connection_that_is_open_and_stalled() -> None:
    with connected(Faults(to_agent=(Stall(0),), to_client=(Delay(DEADLINE),))) as ends:
        ends.agent.sendall(TEXT)
    assert ends.proxy.connections
