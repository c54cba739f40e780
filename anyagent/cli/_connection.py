"""Which agent to connect to, and how: the options that `ask` and `chat` share, checked."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import TYPE_CHECKING, Final

from .._open import open_agent
from .._target import Target
from ..config import Timeouts
from ..testing import embedded_agent
from ._errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from .._agent import Agent
    from ._display import Display

__all__ = ["CLOSE_TIMEOUT", "Connection"]

CLOSE_TIMEOUT: Final = 2.0  # seconds; somebody waits for the shell's prompt


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """A checked choice of agent.

    ``None`` as the `url` stands for the embedded one, as the `dialect` for what the agent negotiates;
    `backend` is AnyIO's name of the event loop.
    """

    url: str | None = dataclasses.field(repr=False)
    headers: tuple[tuple[str, str], ...] = dataclasses.field(repr=False)
    dialect: str | None
    backend: str

    @classmethod
    def parse(cls, url: str | None, headers: Sequence[str], dialect: str | None, backend: str) -> Connection:
        """Check the options; the token of the environment is added.

        Raises `UsageError`, which quotes no secret.
        """
        pairs = [_parse_header(header) for header in headers]
        if url is not None:
            try:
                target = Target.parse(url, pairs)
                token = os.environ.get("ANYAGENT_TOKEN", "").strip()
                if token and not any(name.lower() == "authorization" for name, _ in target.headers):
                    pairs.append(("Authorization", f"Bearer {token}"))
                    Target.parse(url, pairs)
            except ValueError as exc:
                raise UsageError(str(exc)) from None
        return cls(url=url, headers=tuple(pairs), dialect=dialect, backend=backend)

    @contextlib.contextmanager
    def served(self, display: Display) -> Iterator[Connection]:
        """Itself; or, while the block runs, one to an agent that is embedded for the purpose."""
        if self.url is not None:
            yield self
            return
        display.note("no --url is given, so the embedded agent answers, which echoes")
        with embedded_agent() as agent:
            yield dataclasses.replace(self, url=agent.url)

    def open(self) -> AbstractAsyncContextManager[Agent]:
        """`open_agent` with these options."""
        assert self.url is not None, "it is served"
        return open_agent(
            self.url,
            dialect=self.dialect,
            headers=self.headers,
            timeouts=Timeouts(close=CLOSE_TIMEOUT),
        )


def _parse_header(header: str) -> tuple[str, str]:
    name, colon, value = header.partition(":")
    if not colon:
        raise UsageError("--header must be NAME:VALUE")
    return name.strip(), value.strip()
