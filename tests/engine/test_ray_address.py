"""A Ray cluster that is gone is one line, soon."""

from __future__ import annotations

import socket

import pytest

from lic_dist.engine.ray_cluster import _require_answer, connected
from lic_dist.errors import LicError


@pytest.fixture()
def port() -> int:
    """One that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_an_address_that_does_not_answer_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(LicError, match=f"no Ray cluster answers at 127.0.0.1:{port}") as caught, connected(None, 1):
        pass
    assert "unset RAY_ADDRESS" in caught.value.hint
    with pytest.raises(LicError) as caught, connected(f"ray://127.0.0.1:{port}", 1):
        pass
    assert "RAY_ADDRESS" not in caught.value.hint and "ray start" in caught.value.hint


def test_one_that_answers_passes_and_forms_without_a_port_are_rays_to_judge() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        _require_answer(f"127.0.0.1:{server.getsockname()[1]}")
    _require_answer("auto")
