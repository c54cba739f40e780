"""Options that commands share, and help in sections."""

import enum
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand

__all__ = ["AGENTS", "BACKEND", "DIALECT", "ENVIRONMENT", "HEADER", "Backend", "SectionedCommand", "Wire"]

AGENTS: Final = "Agents"
"""The section of the options below."""


class Backend(enum.StrEnum):
    asyncio = "asyncio"
    trio = "trio"


class Wire(enum.StrEnum):
    native = "native"
    single = "single"


HEADER = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME:VALUE",
        help="A header for the WebSocket handshake. May be repeated.",
        rich_help_panel=AGENTS,
    ),
]
DIALECT = Annotated[
    Wire | None,
    typer.Option(
        metavar="native|single", help="The wire's dialect.  [default: negotiated]", rich_help_panel=AGENTS
    ),
]
BACKEND = Annotated[
    Backend, typer.Option(metavar="asyncio|trio", help="The event loop.", rich_help_panel=AGENTS)
]

ENVIRONMENT = """\b
Environment:
  ANYAGENT_URL    stands for --url
  ANYAGENT_TOKEN  is sent as "Authorization: Bearer ...", unless the URL or
                  a --header says otherwise; never to the embedded agent
"""


class SectionedCommand(TyperCommand):
    """A command whose help has a section for each ``rich_help_panel``; nothing of rich is needed for that."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[Any]] = {}
        for param in self.get_params(ctx):
            name = getattr(param, "rich_help_panel", None) or "Other"
            sections.setdefault(name, []).append(param.get_help_record(ctx))
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)
