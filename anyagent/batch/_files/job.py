"""What to do with which files, and what that would come to."""

from __future__ import annotations

import contextlib
import dataclasses
import stat
from typing import TYPE_CHECKING

from .._prompt import key_of
from . import journal as _journal
from .answered import Answered, Content, survey
from .inputs import format_of, read_prompts
from .output import Fsync, OutputError
from .parquet import require_pyarrow

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from .._config import BatchConfig
    from .._prompt import Prompt
    from .inputs import InputFormat

__all__ = ["FileJob", "Plan", "plan"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileJob:
    """What to do with which files.

    * `input`: the prompts; ``None`` is standard input. `input_format` (default: by the name; JSONL for
      standard input), `id_column`, `text_column`: see `read_prompts`.
    * `output`: the answers; ``None`` is standard output. One whose name ends in ``.parquet`` is written at
      the end, out of the answers that are kept in a file beside it meanwhile.
    * `config`: which agents to ask, and how.
    * `fsync`: when to make answers durable.
    * `retry_failed`, `overwrite`: see `OutputFile.open`. Otherwise, prompts that the output has a row for are
      left out.
    """

    input: Path | None
    output: Path | None
    config: BatchConfig
    input_format: InputFormat | None = None
    id_column: str | None = None
    text_column: str | None = None
    fsync: Fsync = Fsync()  # noqa: RUF009 - immutable
    retry_failed: bool = False
    overwrite: bool = False

    @property
    def format(self) -> InputFormat:
        """`input_format`, or what the name stands for; else `InputError`."""
        if self.input_format is not None:
            return self.input_format
        return "jsonl" if self.input is None else format_of(self.input)

    @property
    def as_parquet(self) -> bool:
        """Whether the output is Parquet."""
        return self.output is not None and self.output.suffix.lower() == ".parquet"

    def check(self) -> None:
        """Raise what can be known to be wrong before anything is opened.

        `InputError`, `OutputError`, and `ImportError` for Parquet without pyarrow.
        """
        if self.format == "parquet" or self.as_parquet:
            require_pyarrow()
        if self.input is None or self.output is None:
            return
        for path in (self.output, _journal.path_for(self.output)) if self.as_parquet else (self.output,):
            with contextlib.suppress(OSError):
                if self.input.samefile(path):
                    raise OutputError(path, "it is the input")

    @property
    def waits_for_input(self) -> bool:
        """Whether reading the input may take as long as somebody else likes: it is no regular file."""
        if self.input is None:
            return True
        try:
            return not stat.S_ISREG(self.input.stat().st_mode)
        except OSError:
            return False  # which reading it will say

    def prompts(self) -> Generator[Prompt, None, None]:
        """The prompts of the input."""
        return read_prompts(self.input, self.format, id_column=self.id_column, text_column=self.text_column)


@dataclasses.dataclass(slots=True, kw_only=True)
class Plan:
    """What a run would do.

    * `rows`: prompts in the input. `to_ask`: those that the output has no row for, or, if they are to be
      tried again, one with an error. `failed`: rows of the output with an error.
    * `repeated`: rows with the id, or all that stands for one, of a row before.
    """

    rows: int = 0
    to_ask: int = 0
    failed: int = 0
    repeated: int = 0


def plan(job: FileJob) -> Plan:
    """Read the whole input and output of `job`; nothing is changed, and nobody asked.

    Raises `InputError`, `OutputError` and `ImportError` as `FileRun.run` does.
    """
    job.check()
    if job.output is None or job.overwrite:
        content = Content()
    elif job.as_parquet:
        content = _journal.look_into(job.output, retry_failed=job.retry_failed)
    else:
        content = survey(job.output, retry_failed=job.retry_failed)
    found = Plan(failed=content.failed)
    seen = Answered()
    agent = job.config.agent_name
    with contextlib.closing(job.prompts()) as prompts:
        for prompt in prompts:
            key = key_of(prompt, agent)
            found.to_ask += content.answered.take(key, found.rows) is None
            found.repeated += seen.take(key, 0) is not None
            seen.add(key, 0)
            found.rows += 1
    return found
