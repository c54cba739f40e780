"""What the acceptance tests of batch runs share: files of prompts and answers, and programs to run them."""

from __future__ import annotations

import contextlib
import importlib
import json
import select
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Any

from .processes import DEADLINE, ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

__all__ = ["Program", "program", "rows_in", "rows_in_parquet", "whole_lines", "write_prompts"]


def write_prompts(path: Path, prompts: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file of answers that end in a newline; none, where there is no file yet."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of answers that is complete: it ends in a newline."""
    content = path.read_bytes()
    assert not content or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def rows_in_parquet(path: Path) -> list[dict[str, Any]]:
    parquet: Any = importlib.import_module("pyarrow.parquet")  # which has no types
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


class Program:
    """One of `tests.acceptance.batch_programs`, which answers lines with lines."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self._stdin: IO[bytes] = process.stdin
        self._stdout: IO[bytes] = process.stdout

    def send(self, order: dict[str, Any]) -> None:
        self._stdin.write(json.dumps(order).encode() + b"\n")
        self._stdin.flush()

    def says(self, within: float = DEADLINE) -> bool:
        """Whether it says anything within this time, in seconds."""
        return bool(select.select([self._stdout], [], [], within)[0])

    def line(self) -> Any:
        """The next thing that it says: a line of JSON."""
        return json.loads(self.word())

    def word(self) -> str:
        """The next line that it says."""
        assert self.says(), "it says nothing"
        line = self._stdout.readline()
        assert line, "it has ended"
        return line.decode().strip()

    def ask(self, order: dict[str, Any]) -> Any:
        self.send(order)
        return self.line()

    def complaint(self) -> str:
        """What it has said on its standard error; it ends with that."""
        _, err = self.process.communicate(timeout=DEADLINE)
        return err.decode()


@contextlib.contextmanager
def program(name: str, *arguments: str, before: Sequence[str] = ()) -> Iterator[Program]:
    """Run one of the programs, with the command `before` in front of it. It must not complain of anything."""
    with subprocess.Popen(
        [*before, sys.executable, "-W", "error", "-m", "tests.acceptance.batch_programs", name, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        bufsize=0,
    ) as process:
        try:
            yield Program(process)
            _, err = process.communicate(timeout=DEADLINE)
            assert err == b""
        finally:
            if process.poll() is None:
                process.kill()
