"""The pytest plugin: the fixture `embedded_agent`, in every test run where anyagent is installed.

For the sake of the runs that do not use it, importing this module imports no more than pytest.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from . import EmbeddedAgent, Handler

__all__ = ["EmbeddedAgentFactory", "embedded_agent"]


class EmbeddedAgentFactory(Protocol):
    """What the fixture `embedded_agent` is: starts an agent that lives until the end of the test.

    It takes what `anyagent.testing.embedded_agent` takes, and may be called any number of times.
    """

    def __call__(self, handler: Handler = ..., **options: Any) -> EmbeddedAgent: ...


@pytest.fixture
def embedded_agent() -> Iterator[EmbeddedAgentFactory]:
    """A factory of embedded agents: ``embedded_agent(handler=echo, **options) -> EmbeddedAgent``.

    ::

        def test_my_application(embedded_agent):
            agent = embedded_agent()
            assert my_application.run(agent.url, "Hello!") == "Hello!"

    The options are those of `anyagent.testing.embedded_agent`. All agents are closed at the end of the test.
    """
    from . import echo
    from . import embedded_agent as serve

    with contextlib.ExitStack() as stack:

        def factory(handler: Handler = echo, **options: Any) -> EmbeddedAgent:
            return stack.enter_context(serve(handler, **options))

        yield factory
