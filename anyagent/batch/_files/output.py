"""The output of a batch: a file that grows by whole lines, of one run at a time, and what it survives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from .answered import Answered, Content, OutputError, is_stream, rows_of
from .fsync import Fsync, SyncPolicy
from .inputs import reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

__all__ = ["Fsync", "OutputError", "OutputFile", "SyncPolicy"]

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_STREAM_FLAGS = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_BLOCK = 1 << 20  # bytes, read or written at once
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM})
_MEANINGS = {errno.ENOENT: "its directory does not exist", errno.ENXIO: "nobody reads from it"}


class OutputFile:
    """The file that answers are appended to, one row a line, locked for this run. POSIX only (``flock``).

    A line counts only if it ends in a newline, so a row is there or it is not, whenever the process, or the
    machine, comes to an end; what is left of a row that was not finished is cut off when the file is next
    opened. All that the operating system refuses is an `OutputError`.

    A device or a FIFO is written to and nothing else: no row is read from it, and there is no lock, no cut
    and no sync.

    * `answered`: the rows that were there.
    * `answered_failed`: how many of these have failed.
    * `blocks`: whether writing may take as long as somebody else likes: it is a device, a pipe or a FIFO.

    Synchronous, and for one thread; only `sync` may be called from another one meanwhile. A context manager,
    which closes.
    """

    def __init__(self, path: Path, descriptor: int, content: Content, answered_failed: int) -> None:
        self.answered: Answered = content.answered
        self.answered_failed = answered_failed
        self._path = path
        self._descriptor = descriptor
        self.blocks = not stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._torn = False
        self._lost: str | None = None

    @classmethod
    def open(cls, path: Path, *, retry_failed: bool = False, overwrite: bool = False) -> Self:
        """Open the file, or create it, lock it and read what is answered. `OutputError` where that fails.

        * `retry_failed`: rows that have failed are taken out, so that their prompts are asked again. The file
          is replaced for that by another one with the same mode, at once or, on an error, not at all. Where
          `path` is a symbolic link, what it leads to is replaced.
        * `overwrite`: all that is in it is given up, whatever it is, once it is locked.

        A file that another run has open, or that holds anything but rows of answers, is an `OutputError`, and
        is not touched. Both options at once are a `ValueError`.
        """
        if retry_failed and overwrite:
            raise ValueError("retry_failed and overwrite exclude each other")
        with _explained(path):
            if is_stream(path):
                return cls.over(os.open(path, _STREAM_FLAGS), path)
            descriptor = _open_locked(path)
            try:
                if overwrite:
                    os.ftruncate(descriptor, 0)
                    content = Content()
                else:
                    with open(descriptor, "rb", _BLOCK, closefd=False) as file:
                        content = Content.of(path, file, retry_failed=retry_failed)
                    if retry_failed and content.failed:
                        _take_out_failed(path, descriptor)
                    else:
                        os.ftruncate(descriptor, content.size)
                _sync_directory(path)
                return cls(path, descriptor, content, 0 if retry_failed else content.failed)
            except BaseException:
                os.close(descriptor)
                raise

    @classmethod
    def over(cls, descriptor: int, name: Path) -> Self:
        """Write to a stream that is open already, such as standard output; it is closed with this object.

        `name` is what stands for it in an `OutputError`.
        """
        os.set_blocking(descriptor, True)
        return cls(name, descriptor, Content(), 0)

    def append(self, line: bytes) -> None:
        """Write `line`, which ends in its only newline: when this returns, it outlasts the process.

        It blocks as long as the operating system does. If it raises, nothing of the line is left in the file;
        where it cannot be taken away again, no further line is accepted.
        """
        if self._torn:
            raise OutputError(self._path, "it ends in a part of a row since an earlier error")
        written = 0
        try:
            while written < len(line):  # again only after a short write, as before the disk is full
                written += os.write(self._descriptor, line[written:])
        except BaseException as error:
            if written:
                self._cut(written)
            if isinstance(error, OSError):
                raise OutputError(self._path, reason_of(error)) from error
            raise

    def _cut(self, size: int) -> None:
        try:
            os.ftruncate(self._descriptor, os.lseek(self._descriptor, -size, os.SEEK_CUR))
        except OSError:
            self._torn = True

    def sync(self) -> None:
        """Wait until every line that was appended before is on the disk, where it outlasts a power cut.

        After an error every further call fails too: the lines may be lost, and the operating system reports
        that only once.
        """
        if self._lost is not None:
            raise OutputError(self._path, self._lost)
        if self.blocks:
            return
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._lost = f"rows may be lost if the machine fails: {reason_of(error)}"
            raise OutputError(self._path, self._lost) from error

    def close(self) -> None:
        """Give up the lock and close the file, without a sync. Again: nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with _explained(self._path):
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def _explained(path: Path, what: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = _MEANINGS.get(error.errno or 0) or reason_of(error)
        raise OutputError(path, what + reason) from error


def _open_locked(path: Path) -> int:
    while True:
        with contextlib.ExitStack() as undo:
            descriptor = os.open(path, _FLAGS, 0o666)
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(path, "another run is writing to it") from None
            if _is_named(descriptor, path):
                undo.pop_all()
                return descriptor


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether `path` still leads to the file that is open, and not to one that has replaced it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _take_out_failed(path: Path, descriptor: int) -> None:
    """Replace the file with one without its failed rows, for which `descriptor`, and the lock, stand then."""
    target = _target(path)
    beside = target.with_name(f".{target.name}.rewrite")  # only who holds the lock makes it
    with _explained(path, "cannot be rewritten without its failed rows: "):
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()  # of a run that was killed
        replacement = os.open(beside, _FLAGS | os.O_EXCL, 0o600)
        try:
            fcntl.flock(replacement, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _copy_owner_and_mode(descriptor, replacement)
            with (
                open(descriptor, "rb", _BLOCK, closefd=False) as source,
                open(replacement, "wb", _BLOCK, closefd=False) as sink,
            ):
                source.seek(0)
                sink.writelines(line for line, row in rows_of(path, source) if not row.failed)
            os.fsync(replacement)
            beside.replace(target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()
            raise
        else:
            os.dup2(replacement, descriptor, inheritable=False)
        finally:
            os.close(replacement)


def _copy_owner_and_mode(source: int, target: int) -> None:
    status = os.fstat(source)
    with contextlib.suppress(PermissionError):  # as of one that belongs to somebody else
        os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))


def _target(path: Path) -> Path:
    """The file itself, where `path` is a link to it."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _sync_directory(path: Path) -> None:
    """Make the name of the file durable, where the file system can."""
    try:
        descriptor = os.open(_target(path).parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
