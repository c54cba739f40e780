"""The output of a batch: whole lines, one run at a time, and what is left after all that may happen to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyagent.batch import ErrorRecord, Result, Timings
from anyagent.batch._files.answered import Answered, survey
from anyagent.batch._files.fsync import Fsync, SyncPolicy
from anyagent.batch._files.output import OutputError, OutputFile
from anyagent.batch._files.rows import decode_row, encode_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_ROOT = Path(__file__).parents[1]
_DEADLINE = 60.0
_NOT_A_ROW = "not a row of answers; choose another file, or --overwrite"


def row(key: str, *, failed: bool = False, text: str = "an answer") -> bytes:
    error = ErrorRecord("AgentError", "busy", "later") if failed else None
    answer = None if failed else text
    return encode_row(Result(key, 7, answer, 3, (), Timings(1.5, 1.6, None, 2.0), error))


def keys(path: Path) -> list[str]:
    return [decode_row(line).id for line in path.read_bytes().splitlines(keepends=True)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def refused(path: Path, *, retry_failed: bool = False, overwrite: bool = False) -> str:
    with pytest.raises(OutputError) as caught:
        OutputFile.open(path, retry_failed=retry_failed, overwrite=overwrite)
    assert caught.value.path == path
    said = str(caught.value)
    assert said.startswith(str(path))
    return said.removeprefix(str(path))


def has(answered: Answered, key: str) -> bool:
    """Whether there is a row of this key, which is then taken."""
    return answered.take(key, 0) is not None


def open_descriptors() -> list[str]:
    return os.listdir("/dev/fd")


def descriptors_of(path: Path) -> Iterator[int]:
    for name in open_descriptors():
        with contextlib.suppress(OSError):  # the one of the listing is closed
            if os.path.samestat(os.fstat(int(name)), path.stat()):
                yield int(name)


def run(code: str, *arguments: object, command: Sequence[str] = (sys.executable,), cwd: Path = _ROOT) -> str:
    """What `code` prints, in a process of its own."""
    outcome = subprocess.run(
        [*command, "-W", "error", "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=_DEADLINE,
    )
    assert (outcome.returncode, outcome.stderr) == (0, "")
    return outcome.stdout


# Appending and going on


def test_appended_rows_are_there_when_it_is_opened_again(path: Path) -> None:
    with OutputFile.open(path) as output:
        assert (len(output.answered), output.answered_failed) == (0, 0)
        output.append(row("a"))
        output.append(row("b", failed=True))
        assert keys(path) == ["a", "b"]
    with OutputFile.open(path) as output:
        assert (len(output.answered), output.answered_failed) == (2, 1)
        assert has(output.answered, "a")
        assert has(output.answered, "b")
        assert not has(output.answered, "c")
        assert len(output.answered) == 0
        output.append(row("c"))
    assert keys(path) == ["a", "b", "c"]


def test_a_row_answers_one_prompt_of_its_key() -> None:
    answered = Answered()
    for key in ("twice", "once", "twice"):
        answered.add(key, 0)
    assert len(answered) == 3
    assert [has(answered, "twice") for _ in range(3)] == [True, True, False]
    assert [has(answered, key) for key in ("once", "once", "never")] == [True, False, False]
    assert len(answered) == 0


def test_a_key_may_be_any_text() -> None:
    answered = Answered()
    keys = ["", " ", "ключ", "\ud800", "a" * 100_000]
    for key in keys:
        answered.add(key, 0)
    assert all(has(answered, key) for key in keys)


def test_an_answered_row_takes_less_than_150_bytes_of_memory(figure: Callable[[str], None]) -> None:
    rows = 100_000
    draw = random.Random(5)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        answered = Answered()
        for _ in range(rows):
            answered.add(f"{draw.getrandbits(128):032x}", 0)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    figure(f"{(after - before) / rows:.0f} bytes a row, {(peak - before) / rows:.0f} while it grows")
    assert len(answered) == rows
    assert peak - before < 150 * rows


def test_each_line_is_one_write_to_the_end_of_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write = os.write

    def noted(descriptor: int, data: bytes) -> int:
        written.append(data)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", noted)
    lines = [row("a"), row("long", text="x" * 3_000_000), row("c")]
    with OutputFile.open(path) as output, path.open("ab") as other:
        output.append(lines[0])
        other.write(row("from elsewhere"))
        other.flush()
        output.append(lines[1])
        output.append(lines[2])
    assert written == lines
    assert keys(path) == ["a", "from elsewhere", "long", "c"]


def test_a_new_file_has_the_mode_that_the_umask_leaves(path: Path) -> None:
    before = os.umask(0o027)
    try:
        OutputFile.open(path).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("retry_failed", [False, True])
def test_the_file_is_not_inherited_by_programs_that_are_started(path: Path, retry_failed: bool) -> None:
    path.write_bytes(row("a", failed=True))
    with OutputFile.open(path, retry_failed=retry_failed):
        assert [os.get_inheritable(descriptor) for descriptor in descriptors_of(path)] == [False]


def test_closing_twice_is_allowed_and_leaves_nothing_open(path: Path) -> None:
    before = open_descriptors()
    output = OutputFile.open(path)
    output.close()
    output.close()
    assert open_descriptors() == before
    with pytest.raises(OutputError, match="bad file descriptor"):
        output.append(row("a"))


def test_an_error_of_closing_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = os.close

    def late(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    output = OutputFile.open(path)
    monkeypatch.setattr(os, "close", late)
    with pytest.raises(OutputError, match="quota exceeded"):
        output.close()


# Torn lines


@pytest.mark.parametrize("size", [1, 100, 5_000_000])
def test_a_torn_tail_is_cut_off(path: Path, size: int) -> None:
    whole = row("a") + row("b")
    path.write_bytes(whole + row("c", text="x" * size)[: size + 20])
    with OutputFile.open(path) as output:
        assert path.read_bytes() == whole
        assert [has(output.answered, key) for key in "abc"] == [True, True, False]
        output.append(row("c"))
    assert keys(path) == ["a", "b", "c"]


def test_a_row_that_lacks_only_its_newline_does_not_count(path: Path) -> None:
    path.write_bytes(row("a") + row("b").removesuffix(b"\n"))
    with OutputFile.open(path) as output:
        assert not has(output.answered, "b")
    assert keys(path) == ["a"]


def test_what_a_failing_machine_leaves_behind_the_last_row_is_cut_off(path: Path) -> None:
    path.write_bytes(row("a") + bytes(4096))
    OutputFile.open(path).close()
    assert path.read_bytes() == row("a")


_ROWS = st.lists(
    st.builds(row, st.text(max_size=8), failed=st.booleans(), text=st.text(max_size=20)), max_size=4
)


@given(_ROWS, st.data(), st.booleans())
@settings(deadline=None)
def test_any_prefix_of_a_file_opens_to_its_whole_lines(
    rows: list[bytes], data: st.DataObject, retry_failed: bool
) -> None:
    content = b"".join(rows)
    cut = content[: data.draw(st.integers(0, len(content)), label="bytes left")]
    whole = rows[: cut.count(b"\n")]
    decoded = [decode_row(line) for line in whole]
    kept = [line for line, key in zip(whole, decoded, strict=True) if not (key.failed and retry_failed)]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "answers.jsonl")
        path.write_bytes(cut)
        with OutputFile.open(path, retry_failed=retry_failed) as output:
            assert path.read_bytes() == b"".join(kept)
            answered = Counter(decode_row(line).id for line in kept)
            assert len(output.answered) == len(kept)
            assert all(has(output.answered, key) for key in answered.elements())
            assert output.answered_failed == (0 if retry_failed else sum(key.failed for key in decoded))
        assert os.listdir(directory) == [path.name]


# Files of somebody else


_OTHERS = {
    "prompts": (b'{"id":"a","text":"Hello"}\n', 1),
    "a prompt without a newline": (b'{"id":"a","text":"Hello"}', 1),
    "a prompt that is torn": (b'{"id":"a","te', 1),
    "prompts, spelled with spaces": (b'{"id": "a", "index": 3, "tex', 1),
    "prompts behind rows": (row("a") + row("b") + b'{"id":"c","text":"Hello"}\n', 3),
    "rows behind a prompt": (b'{"id":"c","text":"Hello"}\n' + row("a"), 1),
    "text": (b"Hello\nagent\n", 1),
    "text without a newline": (b"Hello", 1),
    "an empty line": (row("a") + b"\n" + row("b"), 2),
    "no UTF-8": (b"\xff\xfe\n", 1),
    "zeros": (bytes(5000), 1),
    "deeply nested": (row("a").removesuffix(b"}\n") + b',"x":' + b"[" * 100_000 + b"\n", 1),
}


@pytest.mark.parametrize("retry_failed", [False, True])
@pytest.mark.parametrize(("content", "line"), _OTHERS.values(), ids=_OTHERS)
def test_a_file_of_something_else_is_refused_and_left_alone(
    path: Path, content: bytes, line: int, retry_failed: bool
) -> None:
    path.write_bytes(content + b'{"id":"torn"')
    os.utime(path, (1, 1))
    before, descriptors = path.stat(), open_descriptors()
    assert refused(path, retry_failed=retry_failed) == f", line {line}: {_NOT_A_ROW}"
    after = path.stat()
    assert path.read_bytes() == content + b'{"id":"torn"'
    assert (after.st_mtime, after.st_ctime, after.st_ino) == (
        before.st_mtime,
        before.st_ctime,
        before.st_ino,
    )
    assert open_descriptors() == descriptors
    assert os.listdir(path.parent) == [path.name]
    with pytest.raises(OutputError, match=f"line {line}: not a row"):
        survey(path)


def test_an_error_quotes_nothing_of_the_file(path: Path) -> None:
    path.write_bytes(b'{"id":"a","secret":1}\n')
    with pytest.raises(OutputError) as caught:
        OutputFile.open(path)
    assert (caught.value.line, caught.value.__cause__) == (1, None)
    assert caught.value.__suppress_context__
    twin = pickle.loads(pickle.dumps(caught.value))
    assert (twin.path, twin.reason, twin.line, str(twin)) == (path, _NOT_A_ROW, 1, str(caught.value))


# Overwriting


def test_overwriting_begins_anew_whatever_was_there(path: Path) -> None:
    path.write_bytes(b"something else")
    with OutputFile.open(path, overwrite=True) as output:
        assert path.read_bytes() == b""
        assert len(output.answered) == 0
        output.append(row("a"))
    assert keys(path) == ["a"]


def test_overwriting_and_retrying_exclude_each_other(path: Path) -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        OutputFile.open(path, overwrite=True, retry_failed=True)
    assert not path.exists()


# The lock


@pytest.mark.parametrize("option", ["", "retry_failed", "overwrite"])
def test_a_second_run_is_refused_at_once_and_changes_nothing(path: Path, option: str) -> None:
    content = row("a", failed=True) + b'{"id":"to'
    with OutputFile.open(path) as output:
        output.append(content)
        before = open_descriptors()
        assert refused(path, retry_failed=option == "retry_failed", overwrite=option == "overwrite") == (
            ": another run is writing to it"
        )
        assert path.read_bytes() == content
        assert open_descriptors() == before
    OutputFile.open(path).close()
    assert path.read_bytes() == row("a", failed=True)


def test_a_second_run_is_refused_after_the_file_was_replaced(path: Path) -> None:
    path.write_bytes(row("a", failed=True) + row("b"))
    with OutputFile.open(path, retry_failed=True):
        assert refused(path) == ": another run is writing to it"
    OutputFile.open(path).close()


@pytest.mark.parametrize("fate", ["replaced", "removed"])
def test_a_file_that_goes_before_it_is_locked_is_given_up_for_its_successor(
    path: Path, fate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(row("old"))
    flock = fcntl.flock
    times = 0

    def flock_too_late(descriptor: int, operation: int) -> None:
        nonlocal times
        times += 1
        if times == 1 and fate == "replaced":
            path.with_name("new").write_bytes(row("new"))
            path.with_name("new").rename(path)
        elif times == 1:
            path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_too_late)
    before = open_descriptors()
    with OutputFile.open(path) as output:
        assert times == 2
        assert has(output.answered, "new") == (fate == "replaced")
        output.append(row("a"))
        assert keys(path)[-1] == "a"
        assert len(open_descriptors()) == len(before) + 1


def test_the_replacement_is_locked_before_it_can_be_found(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(row("a", failed=True) + row("b"))
    replace = Path.replace
    refusals = []

    def watched(source: Path, target: Path) -> Path:
        for name in (source, target):
            refusals.append(_is_locked(name))
        found = replace(source, target)
        refusals.append(_is_locked(target))
        return found

    monkeypatch.setattr(Path, "replace", watched)
    OutputFile.open(path, retry_failed=True).close()
    assert refusals == [True, True, True]


def _is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


# Taking out what has failed


def test_failed_rows_are_taken_out_to_be_asked_again(path: Path) -> None:
    path.write_bytes(row("a") + row("b", failed=True) + row("c") + row("a", failed=True) + b'{"id":"torn')
    path.chmod(0o604)
    with OutputFile.open(path, retry_failed=True) as output:
        assert keys(path) == ["a", "c"]
        assert (len(output.answered), output.answered_failed) == (2, 0)
        assert [has(output.answered, key) for key in "abca"] == [True, False, True, False]
        output.append(row("b"))
        output.sync()
    assert keys(path) == ["a", "c", "b"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert os.listdir(path.parent) == [path.name]


def test_a_file_without_failed_rows_is_not_replaced(path: Path) -> None:
    path.write_bytes(row("a") + b"torn")
    before = path.stat().st_ino
    OutputFile.open(path, retry_failed=True).close()
    assert path.read_bytes() == row("a")
    assert path.stat().st_ino == before


def test_through_a_symbolic_link_its_target_is_written_and_replaced(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "target.jsonl"
    target.parent.mkdir()
    path.symlink_to(target)
    with OutputFile.open(path) as output:
        output.append(row("a", failed=True))
        output.append(row("b"))
    with OutputFile.open(path, retry_failed=True) as output:
        assert refused(target) == ": another run is writing to it"
        output.append(row("c"))
    assert path.is_symlink()
    assert not target.is_symlink()
    assert keys(target) == ["b", "c"]
    assert os.listdir(target.parent) == [target.name]


def test_what_a_killed_run_left_beside_the_file_is_replaced(path: Path) -> None:
    path.write_bytes(row("a", failed=True) + row("b"))
    left = path.with_name(".answers.jsonl.rewrite")
    left.write_bytes(row("something else"))
    OutputFile.open(path, retry_failed=True).close()
    assert keys(path) == ["b"]
    assert not left.exists()


def test_a_file_of_somebody_else_is_replaced_without_its_owner_if_need_be(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = []

    def not_permitted(_: int, user: int, group: int) -> None:
        owners.append((user, group))
        raise PermissionError

    path.write_bytes(row("a", failed=True))
    status = path.stat()
    monkeypatch.setattr(os, "fchown", not_permitted)
    OutputFile.open(path, retry_failed=True).close()
    assert path.read_bytes() == b""
    assert owners == [(status.st_uid, status.st_gid)]


@pytest.mark.parametrize("step", ["fsync", "replace", "interrupt"])
def test_failed_rows_stay_if_they_cannot_be_taken_out(
    path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = row("a", failed=True) + row("b") + b'{"id":"torn'
    path.write_bytes(content)
    before = open_descriptors()
    error = KeyboardInterrupt() if step == "interrupt" else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace" if step == "replace" else "os.fsync", fail)
        if step == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                OutputFile.open(path, retry_failed=True)
        else:
            said = refused(path, retry_failed=True)
            assert said == ": cannot be rewritten without its failed rows: no space left on device"
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]
    assert open_descriptors() == before
    with OutputFile.open(path, retry_failed=True) as output:
        assert len(output.answered) == 1


# What the operating system refuses


def test_a_parent_that_is_missing_is_told(tmp_path: Path) -> None:
    assert refused(tmp_path / "no" / "answers.jsonl") == ": its directory does not exist"


def test_a_directory_is_told(tmp_path: Path) -> None:
    assert refused(tmp_path) == ": is a directory"
    with pytest.raises(OutputError, match="is a directory"):
        survey(tmp_path)


def test_a_loop_of_links_is_told(path: Path) -> None:
    path.symlink_to(path)
    assert refused(path) == ": too many levels of symbolic links"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EMFILE])
def test_a_file_that_cannot_be_opened_is_told(path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", fail)
    reason = os.strerror(code)
    assert refused(path) == f": {reason[0].lower()}{reason[1:]}"


_AS_NOBODY = """
import os, sys
from pathlib import Path
from anyagent.batch._files.output import OutputError, OutputFile
if os.geteuid() == 0:
    os.seteuid(65534)  # root may write anything
try:
    OutputFile.open(Path("answers.jsonl"), retry_failed=sys.argv[1] == "retry_failed").close()
except OutputError as error:
    print(error)
else:
    print("opened")
"""


@pytest.mark.parametrize(
    ("file_mode", "directory_mode", "option", "said"),
    [
        (0o444, 0o777, "", "answers.jsonl: permission denied"),
        (0o666, 0o555, "", "opened"),
        (0o666, 0o333, "", "opened"),
        (0o666, 0o777, "retry_failed", "opened"),
        (
            0o666,
            0o555,
            "retry_failed",
            "answers.jsonl: cannot be rewritten without its failed rows: permission denied",
        ),
        (None, 0o555, "", "answers.jsonl: permission denied"),
    ],
)
def test_what_the_modes_of_file_and_directory_forbid_is_told(
    path: Path, file_mode: int | None, directory_mode: int, option: str, said: str
) -> None:
    if file_mode is not None:
        path.write_bytes(row("a", failed=True))
        path.chmod(file_mode)
    path.parent.chmod(directory_mode)
    try:
        assert run(_AS_NOBODY, option, cwd=path.parent) == f"{said}\n"
    finally:
        path.parent.chmod(0o755)
    if file_mode is not None:
        assert keys(path) == ([] if (option, said) == ("retry_failed", "opened") else ["a"])


def test_without_the_rights_to_sync_a_directory_it_goes_without(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    OutputFile.open(path).close()


def test_a_directory_that_fails_to_sync_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.EIO))
        assert refused(path) == ": input/output error"
    assert open_descriptors() == before
    OutputFile.open(path).close()


def failing(code: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


# Writes that fail


def short_writes(*results: int | BaseException) -> Callable[[int, bytes], int]:
    """An ``os.write`` that writes as many bytes as it is told to, one number after the other, or raises."""
    write, coming = os.write, iter(results)

    def shorten(descriptor: int, data: bytes) -> int:
        match next(coming):
            case int(size):
                return write(descriptor, data[:size])
            case error:
                raise error

    return shorten


def test_a_short_write_is_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with OutputFile.open(path) as output:
        output.append(row("a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", short_writes(1, 20, 1000))
            output.append(row("b"))
    assert path.read_bytes() == row("a") + row("b")


@pytest.mark.parametrize("results", [(), (1,), (20, 30)])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_line_that_could_not_be_finished_is_taken_away_again(
    path: Path, results: tuple[int, ...], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OutputFile.open(path) as output:
        output.append(row("a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", short_writes(*results, error))
            if isinstance(error, OSError):
                with pytest.raises(OutputError, match=r"answers\.jsonl: no space left on device"):
                    output.append(row("b"))
            else:
                with pytest.raises(KeyboardInterrupt):
                    output.append(row("b"))
        assert path.read_bytes() == row("a")
        output.append(row("c"))
    assert path.read_bytes() == row("a") + row("c")


def test_a_line_that_cannot_be_taken_away_is_the_last_and_is_cut_off_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OutputFile.open(path) as output:
        output.append(row("a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", short_writes(20, OSError(errno.EIO, "Input/output error")))
            patch.setattr(os, "ftruncate", failing(errno.EIO))
            with pytest.raises(OutputError, match="input/output error"):
                output.append(row("b"))
        with pytest.raises(OutputError, match="ends in a part of a row"):
            output.append(row("c"))
        output.sync()
    assert path.read_bytes() == row("a") + row("b")[:20]
    OutputFile.open(path).close()
    assert path.read_bytes() == row("a")


_FILL = """
import resource, signal, sys
from pathlib import Path
from anyagent.batch._files.output import OutputError, OutputFile
path, room, template = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
with OutputFile.open(path) as output:
    if room:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    written = 0
    try:
        while True:
            output.append(template.replace(b"KEY", b"%d" % written) + b"\\n")
            written += 1
    except OutputError as error:
        print(written, error)
    output.sync()
    whole = path.read_bytes()
    assert whole.endswith(b"\\n") and whole.count(b"\\n") == written
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if room:
        output.append(template.replace(b"KEY", b"later") + b"\\n")
"""


def test_a_file_that_may_not_grow_ends_in_a_whole_line_and_goes_on_later(path: Path) -> None:
    template = row("KEY", text="x" * 900).decode().strip()
    room = 64 * 1024
    written, _, said = run(_FILL, path, room, template).strip().partition(" ")
    assert said == f"{path}: file too large"
    assert keys(path) == [*map(str, range(int(written))), "later"]
    assert room - len(template) - 1 < len(b"".join(path.read_bytes().splitlines(keepends=True)[:-1])) <= room


_ON_A_FULL_DISK = (
    _FILL
    + """
old = path.read_bytes()
failed = Path(sys.argv[4]).read_bytes()
old = old.replace(template.replace(b"KEY", b"0") + b"\\n", failed)
path.write_bytes(old)  # it is shorter, so there is room for it
try:
    OutputFile.open(path, retry_failed=True)
except OutputError as error:
    print(error)
assert path.read_bytes() == old
assert [file.name for file in path.parent.iterdir()] == [path.name]
with OutputFile.open(path) as output:
    print(len(output.answered), output.answered_failed)
    output.append(b'{"id":"more"}\\n')  # is there room again
"""
)


def skip_without_mounts() -> list[str]:
    """A command before another one that lets it mount; skips where that is refused."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        probe = subprocess.run(
            [*unshare, "mount", "-t", "tmpfs", "none", "/mnt"],
            capture_output=True,
            text=True,
            timeout=_DEADLINE,
        )
    except FileNotFoundError as error:
        pytest.skip(f"needs {error.filename} for a file system of its own")
    if probe.returncode != 0:
        pytest.skip(f"mounts are refused here: {probe.stderr.strip()}")
    return unshare


def test_on_a_full_disk_all_that_was_written_stays(tmp_path: Path) -> None:
    unshare = skip_without_mounts()
    disk = tmp_path / "disk"
    disk.mkdir()
    failed = tmp_path / "failed"
    failed.write_bytes(row("0", failed=True))
    path = disk / "answers.jsonl"
    mount = 'mount -t tmpfs -o size=64k none "$0" && exec "$@"'
    command = [*unshare, "sh", "-c", mount, str(disk), sys.executable]
    template = row("KEY", text="x" * 900).decode().strip()
    said = run(_ON_A_FULL_DISK, path, 0, template, failed, command=command).splitlines()
    written = int(said[0].partition(" ")[0])
    assert 64 * 1024 // 1100 - 2 <= written <= 64 * 1024 // 1000
    assert said == [
        f"{written} {path}: no space left on device",
        f"{path}: cannot be rewritten without its failed rows: no space left on device",
        f"{written} 1",
    ]
    assert os.listdir(disk) == []  # the mount was not in our own namespace


# Streams


def test_a_full_device_is_told_at_the_first_row() -> None:
    with OutputFile.open(Path("/dev/full"), retry_failed=True) as output:
        assert (len(output.answered), output.answered_failed) == (0, 0)
        for _ in range(2):
            with pytest.raises(OutputError, match="/dev/full: no space left on device"):
                output.append(row("a"))
        output.sync()


def test_a_device_is_only_written_to() -> None:
    for _ in range(2):
        with OutputFile.open(Path("/dev/null"), overwrite=True) as one, OutputFile.open(Path("/dev/null")):
            one.append(row("a"))
            one.sync()
    assert len(survey(Path("/dev/null")).answered) == 0


def test_a_fifo_that_nobody_reads_from_is_told(path: Path) -> None:
    os.mkfifo(path)
    assert refused(path) == ": nobody reads from it"


def test_a_fifo_is_written_to_until_its_reader_leaves(path: Path) -> None:
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with OutputFile.open(path) as output:
        output.append(row("a"))
        output.sync()
        assert os.read(reader, 10_000) == row("a")
        os.close(reader)
        with pytest.raises(OutputError, match=r"answers\.jsonl: broken pipe"):
            output.append(row("b"))


def test_a_line_is_written_whole_to_a_slow_reader(path: Path) -> None:
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    line = row("a", text="x" * 1_000_000)
    seen = []

    def read() -> None:
        with open(reader, "rb") as file:
            seen.append(file.read())

    thread = threading.Thread(target=read)
    with OutputFile.open(path) as output:
        thread.start()
        output.append(line)
    thread.join(_DEADLINE)
    assert seen == [line]


def test_a_stream_that_ends_in_a_part_of_a_row_takes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as file:
        with OutputFile.over(writer, Path("standard output")) as output:
            output.append(row("a"))
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", short_writes(9, OSError(errno.EPIPE, "Broken pipe")))
                with pytest.raises(OutputError, match=r"^standard output: broken pipe$"):
                    output.append(row("b"))
            with pytest.raises(OutputError, match=r"^standard output: it ends in a part of a row"):
                output.append(row("c"))
        assert file.read() == row("a") + row("b")[:9]


def test_standard_output_can_be_named(path: Path) -> None:
    code = """
import sys
from pathlib import Path
from anyagent.batch._files.output import OutputFile
with OutputFile.open(Path("/dev/stdout")) as output:
    output.append(sys.argv[1].encode() + b"\\n")
    output.sync()
"""
    line = row("a").decode()
    assert run(code, line.strip()) == line
    with path.open("ab") as file:
        for _ in range(2):
            subprocess.run([sys.executable, "-c", code, line.strip()], stdout=file, cwd=_ROOT, check=True)
    assert keys(path) == ["a", "a"]


# Looking without touching


def test_a_survey_tells_what_a_run_would_find_and_changes_nothing(path: Path) -> None:
    assert len(survey(path).answered) == 0
    assert not path.exists()
    whole = row("a") + row("b", failed=True)
    path.write_bytes(whole + b"torn")
    with OutputFile.open(path):
        found = survey(path)
        assert (len(found.answered), found.failed, found.size) == (2, 1, len(whole))
        found = survey(path, retry_failed=True)
        assert (len(found.answered), found.failed) == (1, 1)
        assert [has(found.answered, key) for key in "ab"] == [True, False]
    path.write_bytes(whole + b"torn")
    survey(path)
    assert path.read_bytes() == whole + b"torn"


# Syncing


def test_rows_are_appended_while_another_thread_syncs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    synced = []

    def fsync(descriptor: int) -> None:
        begun.set()
        assert go_on.wait(_DEADLINE)
        synced.append(descriptor)

    with OutputFile.open(path) as output:
        monkeypatch.setattr(os, "fsync", fsync)
        thread = threading.Thread(target=output.sync)
        thread.start()
        assert begun.wait(_DEADLINE)
        output.append(row("a"))
        assert keys(path) == ["a"]
        go_on.set()
        thread.join(_DEADLINE)
        assert synced == list(descriptors_of(path))


def test_after_a_sync_that_failed_each_further_one_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"answers\.jsonl: rows may be lost if the machine fails: input/output error$"
    with OutputFile.open(path) as output:
        output.append(row("a"))
        output.sync()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(errno.EIO))
            with pytest.raises(OutputError, match=said) as caught:
                output.sync()
        assert isinstance(caught.value.__cause__, OSError)
        for _ in range(2):
            with pytest.raises(OutputError, match=said):
                output.sync()
        output.append(row("b"))
    assert keys(path) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "rows", "seconds"),
    [
        ("always", 1, None),
        ("never", None, None),
        ("100", 100, None),
        ("5s", None, 5),
        ("0.25s", None, 0.25),
    ],
)
def test_how_often_to_sync_is_read(text: str, rows: int | None, seconds: float | None) -> None:
    assert Fsync.parse(text) == Fsync(rows=rows, seconds=seconds)


@pytest.mark.parametrize(
    "text", ["", "0", "0s", "0.0s", "-1", "1.5", "s", "5 s", "5m", "infs", "nans", "Always", "٣", "1" * 5000]
)
def test_anything_else_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be 'always', 'never', .* such as '100', or of seconds"):
        Fsync.parse(text)


@pytest.mark.parametrize(("rows", "seconds"), [(0, None), (True, None), (None, 0), (None, float("inf"))])
def test_numbers_that_are_not_positive_are_refused(rows: int | None, seconds: float | None) -> None:
    with pytest.raises(ValueError, match=r"Fsync\.(rows|seconds) must be a positive"):
        Fsync(rows=rows, seconds=seconds)


def test_every_second_is_the_default() -> None:
    assert Fsync() == Fsync.parse("1s") == Fsync(rows=None, seconds=1)


def test_a_sync_is_due_so_long_after_the_one_before() -> None:
    policy = SyncPolicy(Fsync(seconds=4), 100)
    assert (policy.due(200), policy.next(200), policy.pending) == (False, None, False)
    policy.wrote()
    assert (policy.due(103), policy.next(103), policy.pending) == (False, 1, True)
    assert (policy.due(104), policy.next(104)) == (True, 0)
    assert (policy.due(109), policy.next(109)) == (True, 0)
    policy.began(110)
    assert (policy.due(120), policy.next(120), policy.pending) == (False, None, False)
    policy.wrote()
    assert (policy.due(113), policy.next(113)) == (False, 1)
    assert policy.due(114)


def test_a_sync_is_due_after_so_many_rows() -> None:
    policy = SyncPolicy(Fsync(rows=2, seconds=None), 0)
    policy.wrote()
    assert (policy.due(1000), policy.next(1000), policy.pending) == (False, None, True)
    policy.wrote()
    assert (policy.due(1000), policy.next(1000)) == (True, 0)
    policy.began(1000)
    assert not policy.due(2000)


def test_a_sync_is_due_for_whichever_reason_comes_first() -> None:
    policy = SyncPolicy(Fsync(rows=2, seconds=4), 0)
    policy.wrote()
    assert (policy.next(1), policy.due(4)) == (3, True)
    policy.wrote()
    assert policy.due(1)


def test_after_each_row_means_after_each() -> None:
    policy = SyncPolicy(Fsync.parse("always"), 0)
    for now in range(3):
        assert not policy.due(now)
        policy.wrote()
        assert policy.due(now)
        policy.began(now)


def test_never_is_never() -> None:
    policy = SyncPolicy(Fsync.parse("never"), 0)
    policy.wrote()
    assert (policy.due(1e9), policy.next(1e9), policy.pending) == (False, None, False)


# Killed

_APPEND = """
import itertools, os, random, sys
from pathlib import Path
from anyagent.batch._files.output import OutputFile
path, template, seed, torn = Path(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3]), int(sys.argv[4])
draw, write = random.Random(seed), os.write
appended = 0

def in_parts(descriptor, data):
    if appended != torn and draw.random() < 0.5:
        return write(descriptor, data)
    size = write(descriptor, data[: draw.randrange(1, max(2, len(data)))])
    if appended == torn:
        write(1, b"torn\\n")
        sys.stdin.read()  # until it is killed
    return size

with OutputFile.open(path) as output:
    os.write = in_parts
    for number in itertools.count():
        if output.answered.take(str(number), number) is None:
            output.append(template.replace(b"KEY", b"%d" % number) + b"\\n")
            appended += 1
            write(1, b"%d\\n" % number)
"""


def test_what_was_acknowledged_is_there_once_after_any_kill(
    path: Path, figure: Callable[[str], None]
) -> None:
    kills, torn, acknowledged = 40, 0, Counter[str]()
    draw = random.Random(20)
    template = row("KEY", text="y" * 50).decode().strip()
    for kill in range(kills):
        rows = draw.randrange(30)
        stop_torn = rows if kill % 2 else -1
        command = [sys.executable, "-c", _APPEND, str(path), template, str(kill), str(stop_torn)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_ROOT) as process:
            assert process.stdout is not None
            try:
                first = [process.stdout.readline() for _ in range(rows + 1)]
            finally:
                process.send_signal(signal.SIGKILL)
            said = [line.decode().strip() for line in [*first, *process.stdout]]
        assert process.returncode == -signal.SIGKILL
        assert (said[-1] == "torn") == (stop_torn >= 0)
        acknowledged.update(set(said) - {"torn"})
        left = path.read_bytes()
        whole = left[: left.rfind(b"\n") + 1]
        torn += whole != left
        with OutputFile.open(path) as output:
            assert path.read_bytes() == whole
            present = keys(path)
            assert len(output.answered) == len(present)
            assert all(has(output.answered, key) for key in present)
        assert len(set(present)) == len(present)
        assert acknowledged.keys() <= set(present)
        assert set(present) == set(map(str, range(len(present))))
    figure(f"{kills} kills, {torn} torn lines, {len(acknowledged)} rows")
    assert set(acknowledged.values()) == {1}
    assert torn >= kills // 2


_REPLACE = """
import os, signal, sys
from pathlib import Path
from anyagent.batch._files.output import OutputFile
path = Path(sys.argv[1])
before, after = path.read_bytes(), Path(sys.argv[2]).read_bytes()
outcomes = []
for moment in range(10_000):
    path.write_bytes(before)
    child = os.fork()
    if not child:
        calls = 0
        def count(frame, event, argument):
            global calls
            calls += event in ("c_call", "c_return")
            if calls > moment:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(count)
        OutputFile.open(path, retry_failed=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    left = path.read_bytes()
    assert left in (before, after), (moment, left)
    with OutputFile.open(path, retry_failed=True) as output:
        assert path.read_bytes() == after
        assert len(output.answered) == after.count(b"\\n")
    assert not path.with_name(".answers.jsonl.rewrite").exists() or left == after
    outcomes.append(left == before)
print(len(outcomes), sum(outcomes))
"""


def test_a_kill_while_failed_rows_are_taken_out_leaves_all_rows_or_the_others(
    path: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    path.write_bytes(row("a") + row("b", failed=True) + row("c") + b'{"id":"torn')
    after = tmp_path / "after"
    after.write_bytes(row("a") + row("c"))
    kills, before = map(int, run(_REPLACE, path, after).split())
    figure(f"{kills} moments, {before} of them before the file is replaced")
    assert 20 < before < kills
