"""Object stores and web servers through obstore: a URL opened, requests repeated with back-off, errors of one line."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

from lic_dist.errors import LicError, UsageError

Options = tuple[tuple[str, str], ...]  # obstore's, sorted: endpoint, region, skip_signature ...

PARALLEL_REQUESTS = 16  # requests in flight from one worker
TRANSFER_TRIES = 5  # tries of a transfer whose body breaks off
CONNECTION_TRIES = 10  # tries of a request that obstore does not send again where its connection breaks off
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0  # seconds between two of these
RETRY = {"max_retries": 10, "retry_timeout": timedelta(minutes=5)}  # of one request, with back-off
TIMEOUT = timedelta(seconds=60)  # of one try
REACHABLE = "does the bucket exist, is it reachable, do the credentials allow it?"

T = TypeVar("T")


def request(url: str, options: Options, call: Callable[[Any, Any], T], hint: str = REACHABLE, once: bool = False) -> T:
    """Return `call(obstore, store)`; repeat it where a transfer broke off, and turn other errors into one line.

    `once`: a deletion or a put of a new object, which obstore does not repeat where its connection breaks off. Here it
    is, since to do either again changes nothing.

    Raises:
        FileNotFoundError: no such key.
        LicError: the store refuses, or stays away.
    """
    import obstore

    remote = object_store(url, options)
    tries = CONNECTION_TRIES if once else TRANSFER_TRIES
    for number in range(tries):
        try:
            return call(obstore, remote)
        except obstore.exceptions.BaseError as error:
            if number < tries - 1 and once and lost_connection(error):
                time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2**number))
                continue
            if number < tries - 1 and broke_off(error):
                continue
            raise LicError(f"{url}: {first_line(error)}", hint=hint) from error
    raise AssertionError("unreachable")


def broke_off(error: Exception) -> bool:
    """Return whether a transfer broke off in its body. obstore neither retries that nor has an error class for it."""
    return "body error" in str(error)


def lost_connection(error: Exception) -> bool:
    """Return whether a connection broke off before the answer, and obstore gave up before its last try."""
    return "error sending request" in str(error) and f"after {RETRY['max_retries']} retries" not in str(error)


@lru_cache(maxsize=16)
def object_store(url: str, options: Options) -> Any:
    """Return obstore's store of a URL. Raises UsageError where obstore is missing or answers to no such URL."""
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError:
        raise UsageError(f"{url} needs the package obstore", hint="pip install obstore") from None
    try:
        config: Any = dict(options)
        client: Any = {"timeout": TIMEOUT, "allow_http": True}
        retry: Any = RETRY
        return from_url(url, config=config or None, client_options=client, retry_config=retry)
    except BaseError as error:
        raise UsageError(f"no object store answers to {url}: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Return what an error of obstore says, without the answer's text."""
    return str(error).splitlines()[0].partition(": <?xml")[0].partition(": <!DOCTYPE")[0][:300]
