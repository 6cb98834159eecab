"""Servers on loopback for tests of photos elsewhere: moto's S3 with a bucket `photos`, and a web server of a folder."""

from __future__ import annotations

import functools
import http.client
import http.server
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lic_dist.remote import object_store


@contextmanager
def bucket() -> Iterator[tuple[dict[str, str], Callable[[str, bytes | None], None]]]:
    """moto's S3: obstore's options for it, and a function that puts a key below s3://photos, or removes it for None."""
    import obstore
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", "/photos")
    assert connection.getresponse().status == 200
    options = {
        "endpoint": f"http://{host}:{port}",
        "region": "us-east-1",
        "access_key_id": "key",
        "secret_access_key": "secret",
    }
    store = object_store("s3://photos", tuple(sorted(options.items())))

    def put(key: str, data: bytes | None) -> None:
        if data is None:
            obstore.delete(store, key)
        else:
            obstore.put(store, key, data)

    yield options, put
    server.stop()


class Web(http.server.SimpleHTTPRequestHandler):
    """Python's own server, which also serves ranges of bytes."""

    def do_GET(self) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not found or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        first, last = int(found[1]), min(int(found[2]), len(data) - 1)
        if first >= len(data):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def web(folder: Path, handler: type[http.server.SimpleHTTPRequestHandler] = Web) -> Iterator[str]:
    """A web server of a folder: its URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
