"""The options of ``anyagent batch``, and their help."""

import enum
import functools
import math
from pathlib import Path
from typing import Annotated, Final

import typer

from ..config import Timeouts
from ._connection import CLOSE_TIMEOUT
from ._display import Display
from ._errors import UsageError, run
from ._options import AGENTS, BACKEND, DIALECT, ENVIRONMENT, HEADER, Backend, SectionedCommand
from ._signals import Signals

__all__ = ["add_to"]

_NOWHERE: Final = "ws://localhost"  # stands for the embedded agent, which has no address yet
_INPUT: Final = "Input and output"
_io = functools.partial(typer.Option, rich_help_panel=_INPUT)
_agents = functools.partial(typer.Option, rich_help_panel=AGENTS)
_pace = functools.partial(typer.Option, rich_help_panel="Pace")
_failures = functools.partial(typer.Option, rich_help_panel="Failures and interruptions")
_show = functools.partial(typer.Option, rich_help_panel="What is shown and reported")


class Format(enum.StrEnum):
    jsonl = "jsonl"
    csv = "csv"
    tsv = "tsv"
    text = "text"
    parquet = "parquet"


class Safety(enum.StrEnum):
    safe = "safe"
    idempotent = "idempotent"


def add_to(app: typer.Typer) -> None:
    """Make this a command of `app`."""
    app.command("batch", cls=SectionedCommand, epilog=_EPILOG)(_batch)


_EPILOG: Final = (
    """\b
Examples:
  anyagent batch prompts.jsonl -o answers.jsonl
  anyagent batch --url wss://a.example/ws --url wss://b.example/ws \\
      prompts.csv --text-column question -o answers.parquet
  anyagent batch --retry idempotent --timeout 120 --max-error-rate 0.05 \\
      prompts.jsonl -o answers.jsonl --report report.html
  anyagent batch - < prompts.jsonl | jq -r .text

\b
Input, as JSON:  {"id": "a1", "text": "Hello, agent!", "more": "columns"}
Output:          {"id", "index", "text", "tokens_used", "attempts",
                  "timings", "error"} and the input's other columns

"""
    + ENVIRONMENT.replace("stands for --url", "stands for --url; several: separated by spaces")
    + """
\b
Signals:
  The first Ctrl-C (SIGINT) or SIGTERM: nothing more is asked; what is in
  flight may end within --grace, and is then cancelled. The second: ends at
  once. Either way no row is lost, and the same command goes on from there.

\b
Exit codes:
  0    all prompts are answered
  1    finished, but some prompts failed; their rows have an error
  2    usage: an option, the input or a row of it is wrong
  3    no connection came about, or none is left
  6    the output, --metrics or --report could not be written
  7    more prompts failed than --max-errors or --max-error-rate allows
  130  interrupted (Ctrl-C)
  141  nobody reads standard output any more
  143  terminated (SIGTERM)
"""
)


def _batch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="The file of prompts; - reads JSON lines from standard input.",
            rich_help_panel=_INPUT,
        ),
    ],
    output: Annotated[
        Path | None,
        _io(
            "-o",
            "--output",
            metavar="FILE",
            help="Where the answers go: *.parquet, or else lines of JSON. If it exists, what is answered "
            "there is not asked again.  [default: standard output]",
        ),
    ] = None,
    input_format: Annotated[
        Format | None,
        _io(
            "--format",
            metavar="FORMAT",
            help="The input's: jsonl, csv, tsv, text (a prompt a line) or parquet.  [default: by its suffix; "
            "standard input: jsonl]",
        ),
    ] = None,
    id_column: Annotated[
        str | None,
        _io(metavar="NAME", help="The column with the ids.  [default: id]"),
    ] = None,
    text_column: Annotated[
        str | None,
        _io(metavar="NAME", help="The column with the prompts.  [default: text]"),
    ] = None,
    ordered: Annotated[
        bool,
        _io("--ordered", help="Keep the input's order in the output."),
    ] = False,
    retry_failed: Annotated[
        bool,
        _io(
            "--retry-failed", help="Also ask what failed the last time: its rows are taken out of the output."
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        _io("--overwrite", help="Begin with an empty output."),
    ] = False,
    fsync: Annotated[
        str,
        _io(
            metavar="always|never|N|Ts",
            help="When written rows are forced to the disk: after each, never, after each N, every T "
            "seconds.",
        ),
    ] = "1s",
    url: Annotated[
        list[str] | None,
        _agents(
            metavar="URL",
            envvar="ANYAGENT_URL",
            help="The agent's ws:// or wss:// address. Repeated: several agents share the work. Without it, "
            "an embedded agent answers, which echoes.",
        ),
    ] = None,
    connections: Annotated[
        int,
        _agents(metavar="N", help="How many connections to each agent."),
    ] = 1,
    agent_name: Annotated[
        str | None,
        _agents(
            metavar="NAME",
            help="What stands for the agents in the digests of prompts without an id.  [default: the "
            "addresses]",
        ),
    ] = None,
    header: HEADER = None,
    dialect: DIALECT = None,
    backend: BACKEND = Backend.asyncio,
    in_flight: Annotated[
        str,
        _pace(
            metavar="N|adaptive",
            help="How many requests at once, to all agents together; adaptive finds out what is best for "
            "each.",
        ),
    ] = "adaptive",
    max_in_flight: Annotated[
        int | None,
        _pace(metavar="N", help="The most that adaptive tries with one agent.  [default: 1000]"),
    ] = None,
    requests_per_minute: Annotated[
        float | None,
        _pace(metavar="N", help="Ask at most that often.  [default: no limit]"),
    ] = None,
    tokens_per_minute: Annotated[
        float | None,
        _pace(metavar="N", help="Have at most that many tokens used.  [default: no limit]"),
    ] = None,
    retry: Annotated[
        Safety,
        _failures(
            metavar="safe|idempotent",
            help="safe: ask again only where no agent can have begun, or has said that it is busy. "
            "idempotent: also after a lost connection or a timeout.",
        ),
    ] = Safety.safe,
    retry_code: Annotated[
        list[str] | None,
        _failures(metavar="CODE", help="Also ask again after an error with this code. May be repeated."),
    ] = None,
    attempts: Annotated[
        int,
        _failures(metavar="N", help="How often a prompt is tried in all."),
    ] = 5,
    timeout: Annotated[
        float | None,
        _failures(metavar="SECONDS", help="How long one attempt may take.  [default: no limit]"),
    ] = None,
    first_event_timeout: Annotated[
        float | None,
        _failures(metavar="SECONDS", help="How long it may take to its first event.  [default: no limit]"),
    ] = None,
    idle_timeout: Annotated[
        float,
        _failures(metavar="SECONDS", help="How long between two events."),
    ] = 600,
    max_errors: Annotated[
        int | None,
        _failures(metavar="N", help="Give up once more prompts have failed.  [default: never]"),
    ] = None,
    max_error_rate: Annotated[
        float | None,
        _failures(
            metavar="SHARE",
            help="Give up once a larger share has failed, from the 100th prompt on; 0.05 is one in twenty.",
        ),
    ] = None,
    grace: Annotated[
        float,
        _failures(metavar="SECONDS", help="How long a first Ctrl-C leaves to what is in flight."),
    ] = 10,
    metrics: Annotated[
        Path | None,
        _show(metavar="FILE", help="Write the figures of the run, as JSON."),
    ] = None,
    report: Annotated[
        Path | None,
        _show(metavar="FILE", help="Write a page with the figures and their plots, as HTML."),
    ] = None,
    json_progress: Annotated[
        bool,
        _show(
            "--json-progress", help="Report on standard error as JSON: a line a second, and one at the end."
        ),
    ] = False,
    quiet: Annotated[
        bool,
        _show("--quiet", help="Neither progress nor summary."),
    ] = False,
    dry_run: Annotated[
        bool,
        _show(
            "--dry-run",
            help="Read everything and say what there is to do; connect to nothing, write nothing.",
        ),
    ] = False,
) -> None:
    """Ask a file of prompts, and write a line of answer for each.

    Answers are written as they arrive. A run that was interrupted, or killed, is gone on with by giving
    the same command again: nothing that is answered is asked twice.
    """

    def command(display: Display, signals: Signals) -> None:
        # Imported here, as the other commands need nothing of it.
        from ..batch import BUSY_CODES, AttemptTimeouts, BatchConfig, Rates, Retry
        from ..batch._files.job import FileJob
        from ..batch._files.output import Fsync
        from . import _batch
        from ._batch_display import view_for
        from ._batch_values import check_distinct, codes_of, connection_to, in_flight_of, naming_options

        if overwrite and retry_failed:
            raise UsageError("--overwrite and --retry-failed exclude each other")
        if quiet and json_progress:
            raise UsageError("--quiet and --json-progress exclude each other")
        if not 0 <= grace < math.inf:
            raise UsageError("--grace must be a number of seconds")
        connection = connection_to(url or [], header or [], dialect, backend)
        with naming_options():
            config = BatchConfig(
                url or _NOWHERE,
                connections=connections,
                agent=agent_name or (None if url else "embedded"),
                dialect=dialect,
                headers=connection.headers,
                connection_timeouts=Timeouts(close=CLOSE_TIMEOUT),
                in_flight=in_flight_of(in_flight, max_in_flight),
                rates=Rates(requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute),
                retry=Retry(
                    safety=retry.value,
                    codes=BUSY_CODES.union(*map(codes_of, retry_code or [])),
                    attempts=attempts,
                ),
                timeouts=AttemptTimeouts(total=timeout, first_event=first_event_timeout, idle=idle_timeout),
                max_errors=max_errors,
                max_error_rate=max_error_rate,
                ordered=ordered,
            )
            job = FileJob(
                input=None if source == "-" else Path(source),
                output=output,
                config=config,
                input_format=None if input_format is None else input_format.value,
                id_column=id_column,
                text_column=text_column,
                fsync=Fsync.parse(fsync),
                retry_failed=retry_failed,
                overwrite=overwrite,
            )
        check_distinct(job, {"--metrics": metrics, "--report": report})
        if dry_run:
            _batch.show_plan(job, display, signals)
            return
        settings = {
            "input": source,
            "output": "-" if output is None else str(output),
            "agents": config.agent_name,
            "connections to each": f"{connections}",
            "in flight": in_flight,
            "retry": f"{retry.value}, {attempts} attempts",
        }
        _batch.batch(
            _batch.Order(
                job=job,
                connection=connection,
                grace=grace,
                metrics=metrics,
                report=report,
                settings=settings,
                view=view_for(display, quiet=quiet, as_json=json_progress),
            ),
            display,
            signals,
        )

    raise typer.Exit(run(command))
