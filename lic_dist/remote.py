"""Object stores and web servers through obstore: a URL opened, requests repeated with back-off, errors of one line."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

from lic_dist.errors import LicError, UsageError

Options = tuple[tuple[str, str], ...]  # obstore's, sorted: endpoint, region, skip_signature ...

PARALLEL_REQUESTS = 16  # requests in flight from one worker
TRANSFER_TRIES = 5  # tries of a transfer whose body breaks off
RETRY = {"max_retries": 10, "retry_timeout": timedelta(minutes=5)}  # of one request, with back-off
TIMEOUT = timedelta(seconds=60)  # of one try
REACHABLE = "does the bucket exist, is it reachable, do the credentials allow it?"

T = TypeVar("T")


def request(url: str, options: Options, call: Callable[[Any, Any], T], hint: str = REACHABLE) -> T:
    """Return `call(obstore, store)`; repeat it where a transfer broke off, and turn other errors into one line.

    Raises:
        FileNotFoundError: no such key.
        LicError: the store refuses, or stays away.
    """
    import obstore

    remote = object_store(url, options)
    for tries_left in reversed(range(TRANSFER_TRIES)):
        try:
            return call(obstore, remote)
        except obstore.exceptions.BaseError as error:
            if tries_left and broke_off(error):
                continue
            raise LicError(f"{url}: {first_line(error)}", hint=hint) from error
    raise AssertionError("unreachable")


def broke_off(error: Exception) -> bool:
    """Return whether a transfer broke off in its body. obstore neither retries that nor has an error class for it."""
    return "body error" in str(error)


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
