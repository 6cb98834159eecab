"""moto's S3 server on this machine, in a process of its own, which answers each request later by so many milliseconds.

`python -m lic_dist.benchmarks.slow_bucket MS` prints its port and serves until its input ends.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from lic_dist.errors import UsageError

URL = "s3://photos"


@contextmanager
def slow_bucket(milliseconds: float) -> Iterator[dict[str, str]]:
    """Serve a bucket named as in URL; yield obstore's options for it. Raises UsageError where moto is missing."""
    if find_spec("moto") is None:
        raise UsageError("this part needs moto's server", hint="pip install 'moto[server]' obstore")
    command = [sys.executable, "-m", "lic_dist.benchmarks.slow_bucket", str(milliseconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        port = server.stdout.readline().strip()
        try:
            yield {
                "endpoint": f"http://127.0.0.1:{port}",
                "region": "us-east-1",
                "access_key_id": "key",
                "secret_access_key": "secret",
            }
        finally:
            server.stdin.close()


def _serve(milliseconds: float) -> None:
    import moto.backends as backends
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open, as with every object store
        disable_nagle_algorithm = True

        def log(self, *_: Any) -> None:
            pass

    answer = DomainDispatcherApplication(create_backend_app)

    def late(environment: dict[str, Any], start: Callable[..., Any]) -> Any:
        time.sleep(milliseconds / 1000)
        return answer(environment, start)

    backends.get_backend("s3")["123456789012"]["global"].create_bucket("photos", "us-east-1")
    server = make_server("127.0.0.1", 0, late, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
