"""Files in an object store, or on a web server that lists them, through obstore (remote.py).

A web server lists a folder by a page of links, as nginx, Apache and Python do, or in a text file of one name a line.
"""

from __future__ import annotations

import io
import re
from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from html.parser import HTMLParser
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urljoin, urlsplit

import numpy as np

from lic_dist.data import images, photo_files
from lic_dist.data.photo import PhotoError
from lic_dist.data.photo_files import PhotoFiles
from lic_dist.data.source import Stamp, version_of
from lic_dist.data.sources.files import Files
from lic_dist.errors import LicError
from lic_dist.remote import PARALLEL_REQUESTS, Options, first_line, request

CHUNK, CHUNKS_AHEAD = 4 << 20, 4  # bytes of one request for a large file, and requests begun ahead
FIRST_KEYS = 1000  # by which it is told what a bucket's prefix holds
MOST_PAGES = 100_000  # folders of a web server that are looked through


class RemoteFiles(Files):
    """Files below a URL, which obstore reads."""

    in_flight = PARALLEL_REQUESTS

    def __init__(self, url: str, options: Options = ()) -> None:
        self.url, self.options = url, options

    @property
    def where(self) -> str:
        return self.url

    @abstractmethod
    def listed(self) -> Iterable[tuple[str, Stamp | None]]:
        """Yield all files, with stamps where the listing has them. Raises LicError where there is no listing."""

    def photos(self) -> PhotoFiles:
        names, sizes, versions, passed_over = list[str](), array("q"), array("q"), Counter[str]()
        for name, stamp in self.listed():
            if kind := photo_files.kind_passed_over(name):
                passed_over[kind] += 1
                continue
            names.append(name)
            if stamp is not None:
                sizes.append(stamp[0])
                versions.append(stamp[1])
        found = PhotoFiles(self.url, names, passed_over)
        if not names:
            raise photo_files.no_photos(found)
        order = sorted(range(len(names)), key=names.__getitem__)
        found.names[:] = [names[row] for row in order]
        if not sizes:
            return found
        stamps = np.stack([np.frombuffer(column, np.int64) for column in (sizes, versions)], axis=1)[order]
        return PhotoFiles(self.url, names, passed_over, stamps)

    def matching(self, pattern: str) -> list[str]:
        if not re.search(r"[*?]", pattern):
            return [pattern] if self.stamp(pattern) != (0, 0) else []
        wanted = re.compile(_as_regular_expression(pattern))
        return sorted(
            name
            for name, _ in self.listed()
            if wanted.fullmatch(name) and not any(map(photo_files.is_hidden, name.split("/")))
        )

    def stamp(self, name: str) -> Stamp:
        try:
            return _stamp(self._request(lambda obstore, store: obstore.head(store, name)))
        except FileNotFoundError:
            return 0, 0

    def read(self, name: str) -> tuple[bytes, Stamp]:
        def read(obstore: Any, store: Any) -> tuple[bytes, Stamp]:
            found = obstore.get(store, name)
            stamp = _stamp(found.meta)
            if stamp[0] > images.LARGEST_FILE:
                raise PhotoError(name, "too large")
            return bytes(found.bytes()), stamp

        try:
            return self._request(read)
        except FileNotFoundError:
            raise PhotoError(name, "unreadable") from None

    def part(self, name: str, offset: int, length: int) -> bytes:
        if not length:
            return b""
        try:
            return self._request(
                lambda obstore, store: bytes(obstore.get_range(store, name, start=offset, length=length))
            )
        except FileNotFoundError:
            raise PhotoError(name, "unreadable") from None
        except LicError as error:
            if "not supported" in error.message:
                hint = "photos in archives and tables are read by ranges of bytes: put them where ranges are served"
                raise LicError(error.message, hint=hint) from None
            if "range" in error.message.lower():  # it begins beyond the end: the file was replaced
                raise PhotoError(name, "changed") from None
            raise

    def open(self, name: str) -> BinaryIO:
        size = self.stamp(name)[0]
        return io.BufferedReader(_Ahead(lambda offset, length: self.part(name, offset, length), size), 1 << 20)

    def _request(self, call: Callable[[Any, Any], Any]) -> Any:
        return request(self.url, self.options, call)


class BucketFiles(RemoteFiles):
    """The keys below a prefix of an object store."""

    def listed(self) -> Iterable[tuple[str, Stamp | None]]:
        # whole in one call: a listing that breaks off is begun again
        found: list[tuple[str, Stamp]] = self._list(
            lambda obstore, store: [(one["path"], _stamp(one)) for page in obstore.list(store) for one in page]
        )
        return found

    def top(self) -> Iterator[tuple[str, bool]]:
        page = self._list(lambda obstore, store: next(iter(obstore.list(store, chunk_size=FIRST_KEYS)), []))
        yield from ((one["path"].partition("/")[0], "/" in one["path"]) for one in page)

    def _list(self, call: Callable[[Any, Any], Any]) -> Any:
        try:
            return self._request(call)
        except FileNotFoundError as error:
            raise LicError(f"{self.url}: {first_line(error)}", hint="does the bucket exist?") from None


class WebFiles(RemoteFiles):
    """What a web server lists below a URL: on pages of links, or in the text file `index`."""

    def __init__(self, url: str, options: Options = (), index: str = "") -> None:
        super().__init__(url, options)
        self.index = index

    def listed(self) -> Iterator[tuple[str, Stamp | None]]:
        if self.index:
            yield from ((name, None) for name in self._below("", self._text(self.index).split("\n")))
            return
        waiting, seen = [""], {""}
        while waiting:
            folder = waiting.pop()
            files, folders = self._links(folder)
            yield from ((name, None) for name in files)
            new = [one for one in folders if one not in seen]
            seen.update(new)
            waiting += new
            if len(seen) > MOST_PAGES:
                raise LicError(f"{self.url} links to more than {MOST_PAGES} folders", hint="give a part of it")

    def top(self) -> Iterator[tuple[str, bool]]:
        files, folders = self._links("")
        yield from [(name, True) for name in folders]
        yield from [(name, False) for name in files]

    def _links(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the files and folders that a folder's page links to, below it."""
        page = _Links()
        page.feed(self._text(folder))
        found = self._below(folder, page.found)
        folders = sorted({name.rstrip("/") for name in found if name.endswith("/")})
        return sorted({name for name in found if not name.endswith("/")}), folders

    def _below(self, folder: str, links: Iterable[str]) -> list[str]:
        """Return links, from the page of a folder, as paths below the root; others are left out."""
        page = f"{self.url}/{quote(folder)}/" if folder else f"{self.url}/"
        inside, found = unquote(urlsplit(page).path), []
        for link in filter(None, map(str.strip, links)):
            there = urlsplit(urljoin(page, link))
            path = unquote(there.path)
            same = (there.netloc, there.query) == (urlsplit(page).netloc, "")
            if same and path.startswith(inside) and path != inside:
                found.append(f"{folder}/{path[len(inside) :]}".lstrip("/"))
        return found

    def _text(self, name: str) -> str:
        try:
            data: bytes = self._request(lambda obstore, store: bytes(obstore.get(store, name).bytes()))
        except FileNotFoundError:
            raise LicError(f"{self.url}/{name} is not there", hint="give a folder that the server lists") from None
        return data.decode("utf-8", "replace")


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


class _Ahead(io.RawIOBase):
    """A large file of so many bytes in requests of CHUNK, some of them begun ahead."""

    def __init__(self, part: Callable[[int, int], bytes], size: int) -> None:
        self.part, self.size, self.at = part, size, 0
        self.pool = ThreadPoolExecutor(CHUNKS_AHEAD)
        self.chunks: dict[int, Future[bytes]] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        if self.at >= self.size:
            return 0
        number, inside = divmod(self.at, CHUNK)
        wanted = range(number, min(number + CHUNKS_AHEAD, -(-self.size // CHUNK)))
        for one in [one for one in self.chunks if one not in wanted]:
            self.chunks.pop(one).cancel()
        for one in wanted:
            if one not in self.chunks:
                self.chunks[one] = self.pool.submit(self.part, one * CHUNK, min(CHUNK, self.size - one * CHUNK))
        data = self.chunks[number].result()[inside : inside + len(buffer)]
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        super().close()


def _stamp(meta: Any) -> Stamp:
    return meta["size"], version_of(meta["e_tag"] or meta["last_modified"].timestamp())


def _as_regular_expression(pattern: str) -> str:
    parts = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return re.sub(r"\\\*\\\*/|\\\*|\\\?", lambda found: parts[found[0].replace("\\", "")], re.escape(pattern))
