"""How asynchronous tests are run: on each backend, under a deadline, in real time only if they need sockets.

* A test runs on asyncio and on Trio, with a clock that jumps as soon as every task waits for time. So a
  deadlock is a `TimeoutError` at once, and no test sleeps.
* A test marked ``sockets`` runs on asyncio, on uvloop and on Trio in real time.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import uvloop

from .clocks import jumping
from .servers import on_demand

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

_FIGURES = pytest.StashKey[list[tuple[str, str]]]()

DEADLINE = 60  # seconds, for a test that is marked ``sockets``
VIRTUAL_DEADLINE = 10_000  # seconds, for any other; they pass in no time


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sockets: needs real sockets or threads, and so runs in real time")
    config.stash[_FIGURES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[_FIGURES]:
        terminalreporter.section("measured figures")
    for test, figure in config.stash[_FIGURES]:
        terminalreporter.line(f"{test}: {figure}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "anyio_backend" in metafunc.fixturenames and "anyio_backend" not in chosen:
        sockets = metafunc.definition.get_closest_marker("sockets") is not None
        backends = ["asyncio", "uvloop", "trio"] if sockets else ["asyncio", "trio"]
        metafunc.parametrize("anyio_backend", backends, indirect=True)


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    in_real_time = request.node.get_closest_marker("sockets") is not None
    match request.param:
        case "uvloop":
            return "asyncio", {"loop_factory": uvloop.new_event_loop}
        case backend:
            return backend, {} if in_real_time else jumping(backend)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Notes what a test has measured; the end of the run prints it beside the name of the test."""
    return lambda text: request.config.stash[_FIGURES].append((request.node.name, text))


@pytest.fixture(scope="session")
def url_of() -> Iterator[Callable[[str], str]]:
    """The URL of an endpoint of `tests.servers`, whose server is started when it is first asked for."""
    with on_demand() as url:
        yield url


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            in_real_time = item.get_closest_marker("sockets") is not None
            item.obj = _under_deadline(item.obj, DEADLINE if in_real_time else VIRTUAL_DEADLINE)


def _under_deadline(test: Callable[..., Awaitable[None]], seconds: float) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def under_deadline(*args: object, **kwargs: object) -> None:
        with anyio.fail_after(seconds):
            await test(*args, **kwargs)

    return under_deadline
