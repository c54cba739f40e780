"""The command line: commands, options and their help."""

import importlib.metadata
from pathlib import Path
from typing import Annotated

import typer

from . import _batch_command
from ._ask import ask
from ._chat import chat
from ._connection import Connection
from ._errors import run
from ._options import BACKEND, DIALECT, ENVIRONMENT, HEADER, Backend, Wire
from ._serve import serve

__all__ = ["app"]


app = typer.Typer(
    help="Talk to an AI agent over a WebSocket: one question, a chat, a file of prompts, or an agent to try "
    "it with.",
    epilog="""\b
Examples:
  anyagent ask "Hello, agent!"
  anyagent chat --url wss://agent.example/ws
  anyagent batch prompts.jsonl -o answers.jsonl
  anyagent serve --port 9000

Each command has a --help of its own.
""",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_URL = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="ANYAGENT_URL",
        help="The agent's ws:// or wss:// address. Without it, an embedded agent answers, which echoes.",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"anyagent {importlib.metadata.version('anyagent')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(
    "ask",
    epilog="""\b
Examples:
  anyagent ask "Hello, agent!"
  anyagent ask --url wss://agent.example/ws - < prompt.txt > answer.txt
  anyagent ask --json --timeout 60 "Count to ten." | jq -r .type

"""
    + ENVIRONMENT
    + """
\b
Exit codes:
  0    the agent answered
  1    it answered with an ERROR
  2    usage: an option, the URL, a header or the prompt is wrong
  3    no connection came about
  4    the connection was lost
  5    the agent broke the protocol
  6    standard output could not be written, or far too slowly
  124  --timeout was reached
  130  interrupted (Ctrl-C)
  141  nobody reads standard output any more
  143  terminated (SIGTERM)
On the last four, too, the agent is told to stop, and the connection closed.
A second signal ends the command at once.
""",
)
def _ask(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The prompt; - reads it from standard input.")],
    url: _URL = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each event, the last one included, as a line of JSON.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long the whole may take.  [default: as long as it takes]"),
    ] = None,
    header: HEADER = None,
    dialect: DIALECT = None,
    backend: BACKEND = Backend.asyncio,
) -> None:
    """Ask one question; print the answer as it arrives.

    Only the answer goes to standard output; it ends with a newline in any case. The agent's reasoning and
    the tokens used are shown on standard error, if that is a terminal. A terminal is shown pictures of
    control characters, a file or pipe gets them unchanged. A tool that the agent calls is answered with
    an error, as there are none, and the answer goes on.
    """
    raise typer.Exit(
        run(
            lambda display, signals: ask(
                text, Connection.parse(url, header or (), dialect, backend), timeout, display, signals
            ),
            as_json=as_json,
        )
    )


@app.command(
    "chat",
    epilog="""\b
Examples:
  anyagent chat
  anyagent chat --url wss://agent.example/ws --history ~/.agent_history
  anyagent chat < questions.txt > answers.txt

"""
    + ENVIRONMENT
    + """
\b
Exit codes:
  0    left with Ctrl-D, or the input ended
  2    usage: an option, the URL, a header or the input is wrong
  3    no connection came about
  4    the connection was lost
  5    the agent broke the protocol
  6    standard output could not be written, or far too slowly
  130  interrupted (Ctrl-C) while connecting, or reading a pipe or file
  141  nobody reads standard output any more
  143  terminated (SIGTERM)
""",
)
def _chat(
    url: _URL = None,
    history: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what is entered in FILE.  [default: only in memory]"),
    ] = None,
    header: HEADER = None,
    dialect: DIALECT = None,
    backend: BACKEND = Backend.asyncio,
) -> None:
    """Hold a conversation.

    Every line entered is a prompt; Arrow-up brings earlier ones back. Ctrl-C stops the answer that is
    arriving, Ctrl-D leaves. Where standard input is no terminal, its lines are the prompts. What is
    shown, and where, is as with "anyagent ask".

    An agent that cannot be told to stop finishes an answer unseen before it takes the next prompt.
    """
    raise typer.Exit(
        run(
            lambda display, signals: chat(
                Connection.parse(url, header or (), dialect, backend), history, display, signals
            )
        )
    )


_batch_command.add_to(app)


@app.command(
    "serve",
    epilog="""\b
Examples:
  anyagent serve
  anyagent serve my_agents:shout --port 9000

\b
with this in my_agents.py:
  async def shout(message, reply):
      await reply.text(message.text.upper())

\b
Exit codes:
  0    stopped (Ctrl-C or SIGTERM)
  1    stopped, but a handler did not end when it was cancelled
  2    usage: an option is wrong, or the handler cannot be imported
  3    the port cannot be listened on
  130  stopped by a second Ctrl-C, without waiting for the handlers
  141  nobody reads standard output any more
  143  stopped by a second SIGTERM, without waiting for the handlers
""",
)
def _serve(
    handler: Annotated[
        str | None,
        typer.Argument(
            metavar="MODULE:HANDLER",
            help="An async function that answers, as anyagent.testing describes it; the module is also "
            "looked for in the current directory.  [default: an echo]",
        ),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Where to listen; 0: on any free port.")
    ] = 8000,
    wire: Annotated[
        Wire,
        typer.Option(metavar="native|single", help="With ids, or one request after the other without."),
    ] = Wire.native,
) -> None:
    """Serve an agent to try things with.

    Its URL is printed on standard output when it is ready.
    """
    raise typer.Exit(run(lambda display, signals: serve(handler, host, port, wire.value, display, signals)))
