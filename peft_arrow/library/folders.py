"""Replace a folder or a file in one step: whoever looks finds the old one or the new one, also after a kill."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


try:
    import fcntl
except ImportError:  # Windows: drafts of killed runs are left for the user to delete
    fcntl = None

_AT_FDCWD, _EXCHANGE = -100, 2
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A draft folder beside `target` that takes its place when the block ends without an error.

    The draft is named `.<name>.draft-...`; what a killed run left of its draft is removed by the next one. Several
    processes may write the same target: each replaces it whole.

    Args:
        target (`Path`): the folder to make or replace; a link is followed.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name[:100]}.draft-"
    _remove_abandoned(target.parent, prefix)
    draft, lock = _locked_draft(target.parent, prefix)
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())
        _take_place(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # the unfinished draft, or the old folder
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[BinaryIO]:
    """A draft file beside `target`, open for writing, that takes its place when the block ends without an error.

    Args:
        target (`Path`): the file to make or replace; its folder is made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    finally:  # after a failure; otherwise it has moved
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)


def _locked_draft(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """A draft whose lock the kernel lifts when this process ends, however it ends."""
    while True:
        draft = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = _lock(draft)
        if draft.exists():  # another run may have taken it for abandoned before it was locked
            return draft, lock
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None where another process holds it, or there are no such locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{glob.escape(prefix)}*"):
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _take_place(draft: Path, target: Path) -> None:
    if not target.exists():
        draft.rename(target)
    elif not _exchange(draft, target):
        # no system call for it here: for a moment there is no target, and the old folder has the draft's name + .old
        old = draft.with_name(f"{draft.name}.old")
        target.rename(old)
        draft.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders by Linux' renameat2; False where the system or the file system has no such call."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
