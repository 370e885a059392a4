"""Ask a busy Hub again: for the calls of huggingface_hub that give up at the first 429 or 503."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from huggingface_hub.errors import HfHubHTTPError


RATE_LIMITED = 429
# What the HTTP client raises where a connection is lost: httpx's, and requests' before version 1 of huggingface_hub.
CLIENT_ERROR = [kind for kind in HfHubHTTPError.__mro__ if kind.__module__.startswith(("httpx", "requests"))][-1]
BUSY = (408, RATE_LIMITED, 500, 502, 503, 504)
TRIES = 5
PATIENCE = 60.0  # seconds after which it is not tried again; huggingface_hub may have waited inside the call, too

logger = logging.getLogger(__name__)
T = TypeVar("T")


def retried(call: Callable[..., T], *args: Any, statuses: Collection[int] = BUSY, **kwargs: Any) -> T:
    """Call; while the Hub says that it is busy, call again after the time it asks for, or 1, 2, 4, 8 seconds.

    Args:
        call: something that may be done twice.
        statuses (`Collection[int]`): the HTTP statuses that mean "busy".
        args, kwargs: for the call.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, or is still busy at the last try.
        OSError: it cannot be reached.
    """
    try:
        return _retried(call, args, kwargs, statuses)
    except HfHubHTTPError:
        raise
    except CLIENT_ERROR as error:
        answer = getattr(error, "response", None)
        if answer is not None:  # version 0 says so that a token is refused
            raise HfHubHTTPError(f"{answer.status_code}: {error}", response=answer) from error
        raise ConnectionError(f"the Hub cannot be reached: {error}") from error


def _retried(call: Callable[..., T], args: Any, kwargs: Any, statuses: Collection[int]) -> T:
    start = time.monotonic()
    for number in range(1, TRIES):
        try:
            return call(*args, **kwargs)
        except HfHubHTTPError as error:
            # version 0 of huggingface_hub says of a busy Hub that a file was not found, and why in the cause
            answer = error.response if error.response is not None else getattr(error.__cause__, "response", None)
            if answer is None or answer.status_code not in statuses or time.monotonic() - start > PATIENCE:
                raise
            seconds = _asked_for(answer.headers) or 2.0 ** (number - 1)
            logger.warning("The Hub answered %s; trying again in %g seconds.", answer.status_code, seconds)
        time.sleep(seconds)
    return call(*args, **kwargs)


def _asked_for(headers: Any) -> float | None:
    """The seconds that the Hub asks to wait: `Retry-After: 7`, or `RateLimit: "api";r=0;t=7`."""
    found = re.fullmatch(r"\s*(\d{1,4})\s*", headers.get("Retry-After", ""))
    found = found or re.search(r"\bt=(\d{1,4})\b", headers.get("RateLimit", ""))
    return float(found[1]) if found else None
