"""Stores in an object store: moto's S3 on loopback, behind a proxy that fails, drops and delays requests."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import pickle
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("moto.server")
pytest.importorskip("obstore")

from lic_dist import config
from lic_dist.building.build import build as build_cache
from lic_dist.building.build import repair, requantize
from lic_dist.building.records import named_record
from lic_dist.cache import growth, layout, markers, store
from lic_dist.cache.bucket import Bucket
from lic_dist.cache.history import history
from lic_dist.cache.inspect import inspect
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.storage import Entry
from lic_dist.cache.storages import open_storage
from lic_dist.cache.verify import Finding, verify
from lic_dist.engine.run import run
from lic_dist.engine.stages import Stage
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.remote import RETRY, object_store
from lic_dist.training.finetune import finetune
from tests.cache.test_growth import grow
from tests.stores import FIXED, RECORD, experiment, make_builder, make_plan, objects, synthetic

FAULTS = ("error", "drop", "reset", "slow", "cut", "lost", "lost reset")


class Faults:
    """What the proxy does to requests: `fail(number)` says how, of every request by its number."""

    def __init__(self) -> None:
        self.how = lambda number: ""
        self.count = 0
        self.failed = 0
        self.lock = threading.Lock()


def proxy(port: int, faults: Faults) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each answer waits for an acknowledgement, 40 ms

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with faults.lock:
                how = faults.how(faults.count)
                faults.count += 1
                faults.failed += how in FAULTS
            if how == "error":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if how == "drop":
                self.close_connection = True
                return
            if how == "reset":
                self.reset()
                return
            if how == "slow":
                time.sleep(0.1)
            upstream = http.client.HTTPConnection("127.0.0.1", port)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            data = answer.read()
            if how == "lost":  # the store has done it; nobody hears of it
                upstream.close()
                self.close_connection = True
                return
            if how == "lost reset":
                upstream.close()
                self.reset()
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if how == "cut":
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif self.command != "HEAD":
                self.wfile.write(data)
            upstream.close()

        def reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def s3() -> Iterator[Faults]:
    """A bucket named `photos`, reached by the environment's endpoint through the proxy."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    moto.start()
    port = moto.get_host_and_port()[1]
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", "/photos")
    assert connection.getresponse().status == 200
    faults = Faults()
    front = proxy(port, faults)
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{front.server_port}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield faults
    front.shutdown()
    moto.stop()


@pytest.fixture(autouse=True)
def calm(s3: Faults) -> Iterator[None]:
    s3.how, s3.count, s3.failed = lambda number: "", 0, 0
    yield
    s3.how = lambda number: ""


def create(url: str) -> None:
    store.create(url, make_plan())
    store.create_group(url, "tcq8", RECORD, {"record": "cd" * 32})


def build(url: str, **engine) -> None:
    work = Stage("build", partial(make_builder, url, make_plan()), workers=2 if engine else 1)
    list(run([work], store.pending(url), **engine))


def everything_in(name: str) -> list[str]:
    return list(open_storage(f"s3://photos/{name}/a.zarr").listing())


def contents(url: str) -> dict[str, bytes]:
    storage = open_storage(url)
    return {key: storage.get(key) for key in storage.listing() if not key.startswith(markers.FOLDER)}


def test_a_bucket_does_what_a_folder_does(tmp_path):
    for storage in (open_storage("s3://photos/places/a"), open_storage(tmp_path / "a")):
        assert storage.listing() == {} and storage.names() == [] and storage.entry("x") is None
        with pytest.raises(FileNotFoundError):
            storage.get("x")
        assert storage.get_json("x") is None
        storage.make()
        assert storage.put_new("x", b"first") and not storage.put_new("x", b"second")
        storage.put_all({"b/c/d": b"123", "b/e": b""})
        assert storage.get("x") == b"first" and storage.get("b/e") == b""
        assert {key: entry.bytes for key, entry in storage.listing().items()} == {"x": 5, "b/c/d": 3, "b/e": 0}
        assert list(storage.listing("b/c")) == ["b/c/d"] and storage.names("b") == ["c", "e"]
        entry = storage.entry("b/c/d")
        assert isinstance(entry, Entry) and entry.bytes == 3 and abs(entry.modified - time.time()) < 60
        storage.put("x", b"third")
        assert (
            pickle.loads(pickle.dumps(storage)) == storage and pickle.loads(pickle.dumps(storage)).get("x") == b"third"
        )
        storage.delete("x")
        storage.delete("x")
        around, key = storage.sibling(".manifest.parquet")
        around.put(key, b"manifest")
        assert key == "a.manifest.parquet" and around.get("a.manifest.parquet") == b"manifest"
        storage.clear()
        assert storage.listing() == {}


def test_a_key_that_is_not_there_may_be_deleted_where_the_store_minds(monkeypatch):
    def minds(*_):  # as GCS does, and S3 does not
        raise FileNotFoundError("Object at location x not found")

    monkeypatch.setattr("obstore.delete", minds)
    open_storage("s3://photos/places/b").delete("x")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["drop", "reset", "lost", "lost reset"])
def test_deletions_and_puts_of_new_objects_survive_lost_connections(s3, how):
    """obstore sends these once."""
    storage = open_storage(f"s3://photos/once-{how.replace(' ', '-')}/a.zarr")
    for work, left in (
        (lambda: storage.put_new("a", b"1"), ["a"]),
        (lambda: storage.put_new("b", b"2"), ["a", "b"]),
        (lambda: storage.delete("a"), ["b"]),
        (lambda: storage.clear(), []),
    ):
        s3.count, s3.how = 0, lambda number: how if number < 2 else ""
        assert work() in (True, None)
        s3.how = lambda number: ""
        assert storage.names() == left


def test_options_stand_for_the_environment(monkeypatch):
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    options = {"endpoint": endpoint, "access_key_id": "key", "secret_access_key": "secret", "region": "us-east-1"}
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    storage = open_storage("s3://photos/by-options", options)
    storage.put("a", b"1")
    assert storage.names() == ["a"]


def test_wrong_urls_and_buckets_are_one_line():
    with pytest.raises(UsageError, match="no object store answers to ftp://"):
        open_storage("ftp://host/x")
    with pytest.raises(UsageError, match="whole bucket"):
        open_storage("s3://photos").sibling(".json")
    with pytest.raises(LicError, match="no cache at s3://photos/none"):
        LatentCache.open("s3://photos/none.zarr")
    with pytest.raises(LicError, match="does the bucket exist") as caught:
        store.create("s3://nowhere/a.zarr", make_plan())
    assert "\n" not in caught.value.message


@pytest.mark.slow
def test_the_same_bytes_as_in_a_folder(tmp_path):
    url = "s3://photos/same/a.zarr"
    create(url)
    build(url)
    folder = tmp_path / "a.zarr"
    store.create(folder, make_plan())
    store.create_group(folder, "tcq8", RECORD, {"record": "cd" * 32})
    list(run([Stage("build", partial(make_builder, folder, make_plan()))], store.pending(folder)))
    remote = contents(url)
    assert sorted(remote) == sorted(objects(folder))
    assert all((folder / key).read_bytes() == data for key, data in remote.items())
    assert verify(url) == [] and store.pending(url) == []
    cache = pickle.loads(pickle.dumps(LatentCache.open(url)))
    np.testing.assert_array_equal(cache.load(["pixels"], [0])["pixels"][0], synthetic(4, 0)["pixels"][0])
    assert cache[9]["latents/z"].shape == (4, 1, 1) and cache.samples["source"][3] == "ordner/ä3.png"
    report = inspect(url)
    assert report["usable"] == 9 and report["bytes"] > sum(map(len, remote.values()))
    assert report["groups"]["tcq8"]["bits_per_pixel"] == 1.0


@pytest.mark.slow
def test_a_build_survives_errors_dropped_and_slow_answers(s3, monkeypatch):
    soon = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=50), "base": 2}
    monkeypatch.setitem(RETRY, "backoff", soon)
    object_store.cache_clear()
    url = "s3://photos/bad-day/a.zarr"
    kinds = {0: "error", 3: "drop", 5: "slow", 6: "cut", 8: "lost"}
    s3.how = lambda number: kinds.get(number % 11, "")
    create(url)
    build(url)
    assert store.pending(url) == [] and verify(url) == []
    loaded = LatentCache.open(url).load(["pixels", "quantized/tcq8/k"])
    assert s3.failed > 20
    s3.how = lambda number: ""
    np.testing.assert_array_equal(loaded["pixels"][:4], synthetic(4, 0)["pixels"])
    good = "s3://photos/good-day/a.zarr"
    create(good)
    build(good)
    assert contents(url) == contents(good)
    object_store.cache_clear()


@pytest.mark.slow
def test_a_build_that_lost_the_store_for_good_goes_on_later(s3, monkeypatch):
    url = "s3://photos/outage/a.zarr"
    create(url)
    make_builder(url, make_plan())(0)
    monkeypatch.setitem(RETRY, "max_retries", 1)
    object_store.cache_clear()
    s3.how = lambda number: "error"
    with pytest.raises(LicError, match="s3://photos/outage/a.zarr") as caught:
        make_builder(url, make_plan())(1)
    assert "\n" not in caught.value.message and caught.value.hint
    s3.how = lambda number: ""
    object_store.cache_clear()
    assert store.pending(url) == [1, 2]
    build(url)
    assert verify(url) == []
    monkeypatch.undo()
    object_store.cache_clear()


@pytest.mark.slow
def test_a_store_in_a_bucket_grows_as_one_in_a_folder_does(s3, tmp_path):
    url, folder = "s3://photos/grown/a.zarr", tmp_path / "a.zarr"
    for where in (url, str(folder)):
        create(where)
        for shard in range(3):
            make_builder(where, make_plan())(shard)
    before = contents(url)
    s3.count, s3.how = 0, lambda number: {5: "lost", 9: "error", 13: "drop"}.get(number % 16, "")
    for where in (url, str(folder)):
        grow(open_storage(where), masked=[2])
        growth.name_snapshot(open_storage(where), "clean")
    s3.how = lambda number: ""
    assert s3.failed > 20
    after = contents(url)
    assert {key for key, data in before.items() if after[key] != data} <= {key for key in before if "/c/" not in key}
    same = {key: data for key, data in after.items() if "/c/" in key or "mask" in key or key.endswith("parquet")}
    assert all((folder / key).read_bytes() == data for key, data in same.items()) and len(same) > 80
    assert verify(url) == [] and growth.snapshot_names(open_storage(url)) == {"clean": 2}
    assert history(url)["snapshots"][2]["digest"] == history(folder)["snapshots"][2]["digest"]
    for snapshot in (0, 1, "clean"):
        remote, local = (LatentCache.open(where, snapshot=snapshot) for where in (url, folder))
        assert len(remote) == len(local) and remote.masked.tolist() == local.masked.tolist()
        assert all(np.array_equal(remote.samples[name], local.samples[name]) for name in local.samples)
        assert np.array_equal(remote.load(["pixels"])["pixels"], local.load(["pixels"])["pixels"])


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(0)
def test_a_storm_of_faults_leaves_the_bytes_of_a_calm_day(s3, monkeypatch):
    """Three requests in ten fail, in one of seven ways; a job that gives up is started again."""
    soon = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=20), "base": 2}
    monkeypatch.setitem(RETRY, "backoff", soon)
    object_store.cache_clear()
    monkeypatch.setattr(growth, "time", SimpleNamespace(strftime=lambda *_: "2026-01-01T00:00:00Z", gmtime=time.gmtime))

    def live(url: str) -> None:
        """A store's life, from wherever a job before has stopped."""
        create(url)
        if layout.read_header(open_storage(url)).snapshot == 0:
            build(url)
        grow(open_storage(url), masked=[2])
        growth.name_snapshot(open_storage(url), "clean")
        store.create_group(url, "sq", RECORD, {"record": "ef" * 32})
        header = layout.read_header(open_storage(url))
        for shard in store.pending(url, "sq"):
            arrays = synthetic(header.count(shard), shard, group="sq")
            group = {name: rows for name, rows in arrays.items() if name.startswith("quantized")}
            store.write_shard(url, header.fingerprint, shard, group)
        assert verify(url) == []
        names = LatentCache.open(url).names
        read = LatentCache.open(url).load(names)
        assert all(read[name].any() for name in names)

    live("s3://photos/calm/a.zarr")
    everything = {key: open_storage("s3://photos/calm/a.zarr").get(key) for key in everything_in("calm")}
    weather, round = random.Random(24), 0
    while s3.failed < 10_000:
        name = f"storm-{round}"
        s3.how = lambda number: weather.choice(FAULTS) if weather.random() < 0.3 else ""
        for _ in range(5):
            with contextlib.suppress(LicError):
                live(f"s3://photos/{name}/a.zarr")
                break
        else:
            pytest.fail("no life came to its end")
        s3.how = lambda number: ""
        assert {key: open_storage(f"s3://photos/{name}/a.zarr").get(key) for key in everything_in(name)} == everything
        round += 1
    object_store.cache_clear()


@pytest.mark.slow
def test_damage_in_a_bucket_is_found():
    url = "s3://photos/damage/a.zarr"
    create(url)
    build(url)
    storage = Bucket(url)
    specs = {spec.name: spec for spec in layout.base_arrays(LatentCache.open(url).geometry, True)}
    storage.delete(layout.object_key(specs["pixels"], 1))
    storage.put(layout.object_key(specs["latents/y"], 0), storage.get(layout.object_key(specs["latents/y"], 2)))
    assert verify(url) == [Finding(0, "latents/y", "altered"), Finding(1, "pixels", "missing")]
    assert store.pending(url) == [0, 1] or store.pending(url) == [1]
    with pytest.raises(LicError, match="has lost an object"):
        LatentCache.open(url).shard(1)


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["zarr", "zarrs"])
def test_streams_and_views_read_a_bucket_as_they_read_a_folder(tmp_path, pipeline):
    pytest.importorskip("xarray")
    pytest.importorskip(pipeline)
    url = f"s3://photos/stream-{pipeline}.zarr"
    for where in (url, str(tmp_path / "a.zarr")):
        create(where)
        for shard in range(3):
            make_builder(where, make_plan())(shard)
    remote, local = LatentCache.open(url, pipeline=pipeline), LatentCache.open(tmp_path / "a.zarr")
    names = ["pixels", "quantized/tcq8/k"]
    for one, other in zip(
        islice(remote.stream(names, batch=3), 6), islice(local.stream(names, batch=3), 6), strict=True
    ):
        assert all(bool((one[name] == other[name]).all()) for name in other)
    for number in (0, 6):
        assert bool((remote.dataset(names)[number]["pixels"] == local.dataset(names)[number]["pixels"]).all())
    view = remote.to_xarray()
    assert view.drop_attrs().identical(local.to_xarray().drop_attrs().load())
    open_storage(url).delete("pixels/c/1/0/0/0")
    with pytest.raises(LicError, match="shard 1 of .*, array pixels, has lost its object"):
        remote.shard(1, ["pixels"])


@pytest.mark.slow
def test_the_real_job_builds_quantizes_repairs_and_trains_from_a_bucket(base, photos, mine, tmp_path):
    url, folder = "s3://photos/real/a.zarr", mine
    asked = experiment(base, photos, url, quantizer=FIXED)
    assert build_cache(asked).shards_built == 3 and build_cache(asked).shards_built == 0
    for where in (url, str(folder)):
        more = experiment(base, photos, where, quantizer={**FIXED, "states": 4, "group": "tcq4"})
        assert requantize(more).shards_built == 3
    storage, same = open_storage(url), {key: data for key, data in contents(url).items() if "/c/" in key}
    assert len(same) == 3 * (10 + 2 * 3)
    assert all((folder / key).read_bytes() == data for key, data in same.items())
    assert open_storage("s3://photos/real").names() == ["a.manifest.parquet", "a.zarr"]
    assert named_record(checkpoint.load(str(base)), f"{url}/quantized/tcq4").states == 4
    storage.delete("latents/y/c/1/0/0/0")
    asked = experiment(base, photos, url, quantizer=FIXED)
    assert repair(asked, verify(url)) == 1 and verify(url) == []
    assert contents(url)["latents/y/c/1/0/0/0"] == same["latents/y/c/1/0/0/0"]
    section = {"recipe": "decoder", "steps": 2, "batch": 4, "evaluate_every": 2, "warmup": 1, "out": str(tmp_path)}
    document = {**asked.model_dump(mode="json"), "finetune": section}
    assert finetune(config.Experiment.model_validate(document)).is_file()
    assert build_cache(experiment(base, photos, url, quantizer={**FIXED, "step": 0.8}), rebuild=True).shards_built == 3
    assert LatentCache.open(url).groups == ("tcq8",)
