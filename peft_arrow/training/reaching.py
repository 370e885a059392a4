"""Whose fault it is that something could not be read: the network's, this machine's, or that of who asked for it."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..library.reading import Location
from ..library.retrying import BUSY, CLIENT_ERROR


_LOST = (ConnectionError, TimeoutError, CLIENT_ERROR)
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE)
CONFIG_NAME = "config.json"


def unreadable(what: str, tried: str, error: BaseException) -> OSError | ValueError:
    """The error to raise in the place of one that came of reading something.

    Args:
        what (`str`): what was read, such as `dataset 'sql': 'me/sql'`.
        tried (`str`): how, such as `was tried as a folder`.
        error (`BaseException`): one of `READ_ERRORS`.

    Returns:
        `ConnectionError` where the connection broke off or the Hub is busy, another `OSError` where the disk is full
        or broken: the same may succeed later. Otherwise `ValueError`.
    """
    causes = list(_causes(error))
    lost = [cause for cause in causes if _is_lost(cause)]
    if lost and not constants.HF_HUB_OFFLINE:
        return ConnectionError(
            f"{what} cannot be fetched, the connection to the Hub failed: {first_line(lost[0])}; try again later."
        )
    machine = [cause for cause in causes if isinstance(cause, OSError) and cause.errno in _OF_THE_MACHINE]
    if machine:
        return OSError(f"{what} cannot be read: {first_line(machine[0])}")
    return ValueError(f"{what} {tried}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The first line of a message, or the error's type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def commit_of(name: str, revision: str | None, options: dict) -> str | None:
    """The commit that a revision of a model on the Hub is now; asks again while the Hub is busy.

    Returns:
        `str` or None: None where the model has no config.

    Raises:
        one of `READ_ERRORS`.
    """
    place = Location(repo_id=name, revision=revision, **options)
    try:
        return place.pinned_by(place.file(CONFIG_NAME)).commit
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise
        return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_lost(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    return isinstance(error, _LOST) and (response is None or response.status_code in BUSY)
