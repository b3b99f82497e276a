"""Versions in object stores on the loopback: S3Proxy, Azurite, and a stand-in for Google's.

They are behind a proxy that fails requests on purpose.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

from state.errors import SnapshotCorrupt, SnapshotError, SnapshotExists, SnapshotNotFound
from state.manifest import Manifest
from state.store import SnapshotStore
from tests.state.fake_gcs import TOKEN, fake_gcs
from tests.state.faulty_proxy import Fault, FaultyProxy, Request, faulty_proxy
from tests.state.made_version import FILES, at, serving, small_pieces, trainer, write
from tests.state.servers import AZURE_ACCOUNT, AZURE_KEY, S3_KEY, S3_SECRET, azurite, make_container, s3_server

# The variables that a machine's own credentials could be in.
_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


class Place(NamedTuple):
    """A bucket or container of one's own, by a proxy of one's own."""

    url: str
    proxy: FaultyProxy


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3") / "server") as address:
        yield address


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with azurite(tmp_path_factory.mktemp("azure") / "server") as address:
        yield address


@pytest.fixture
def gcs() -> Iterator[str]:
    with fake_gcs() as address:
        yield address


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # Outages are short here, and so is the patience.
    monkeypatch.setattr("state.object_store.REPEAT_S", 1)


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with faulty_proxy(s3) as proxy:
        yield s3_bucket(proxy, monkeypatch)


@pytest.fixture(params=["s3", "azure", "gcs"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with faulty_proxy(request.getfixturevalue(request.param)) as proxy:
        if request.param == "s3":
            yield s3_bucket(proxy, monkeypatch)
            return
        if request.param == "gcs":
            monkeypatch.setenv("GOOGLE_BASE_URL", proxy.address)
            monkeypatch.setenv("GOOGLE_BEARER_TOKEN", TOKEN)
            yield Place("gs://bucket/some/prefix", proxy)
            return
        name = f"c{uuid.uuid4().hex}"
        make_container(request.getfixturevalue("azure"), name)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", AZURE_ACCOUNT)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", AZURE_KEY)
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{proxy.address}/{AZURE_ACCOUNT}")
        yield Place(f"az://{name}/some/prefix", proxy)


def s3_bucket(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Place:
    import urllib.request

    name = f"b{uuid.uuid4().hex}"
    with urllib.request.urlopen(urllib.request.Request(f"{proxy.address}/{name}", method="PUT")):
        pass
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return Place(f"s3://{name}/some/prefix", proxy)


def is_whole(store: SnapshotStore, version: int, value: float) -> bool:
    found = store.serving(version), store.trainer(version)
    return store.verify(version) == [] and all(
        torch.equal(tensors[name], made[name])
        for tensors, made in zip(found, (serving(value), trainer(value)), strict=True)
        for name in made
    )


def test_a_version_is_written_listed_read_and_deleted(place: Place) -> None:
    store = at(place.url)
    assert store.versions() == [] and store.next_version() == 1
    with pytest.raises(SnapshotNotFound, match="the store has no version"):
        store.manifest(1)
    write(store, 1, 1.0)
    write(store, 3, 3.0)
    assert store.versions() == [1, 3] and store.next_version() == 4
    assert is_whole(store, 1, 1.0) and is_whole(store, 3, 3.0)
    store.delete(1)
    store.delete(1)
    assert store.numbers() == [3]
    with pytest.raises(SnapshotNotFound, match=r"found nothing \(the store has 1 versions, the newest 3\)"):
        store.serving(1)


def test_a_number_is_written_once(place: Place) -> None:
    store = at(place.url)
    write(store, 1, 1.0)
    with pytest.raises(SnapshotExists, match=r"found dense\.safetensors: another trainer wrote it"):
        write(at(place.url), 1, 2.0)
    assert is_whole(store, 1, 1.0)


def test_two_writers_of_one_number_cannot_both_win(place: Place) -> None:
    outcomes: list[float | None] = []
    barrier = threading.Barrier(4)

    def run(value: float) -> None:
        store = at(place.url)
        barrier.wait()
        try:
            write(store, 1, value)
            outcomes.append(value)
        except SnapshotExists:
            outcomes.append(None)

    threads = [threading.Thread(target=run, args=(float(number),)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [value for value in outcomes if value is not None]
    assert len(outcomes) == 4 and is_whole(at(place.url), 1, winner)


def test_lists_go_on_after_their_first_page(bucket: Place) -> None:
    bucket.proxy.plan = lambda request: "small pages" if request.method == "GET" else None
    store = at(bucket.url)
    for version in range(1, 8):
        write(store, version)
    before = bucket.proxy.count("GET")
    assert store.versions() == list(range(1, 8)) and store.next_version() == 8
    assert bucket.proxy.count("GET") - before > 7 * len(FILES) / 3
    assert store.verify(5, hashes=False) == []
    store.delete(5)
    assert 5 not in store.numbers()


def test_a_store_that_is_unavailable_for_a_moment_is_asked_again(place: Place) -> None:
    store = at(place.url)
    place.proxy.fail("unavailable", times=2, name="serving-00001.safetensors")
    write(store, 1)
    place.proxy.fail("unavailable", times=2, method="GET", name="serving-00001.safetensors")
    assert is_whole(store, 1, 1.0)
    assert place.proxy.count("PUT", "serving-00001.safetensors") == 3


@pytest.mark.parametrize("name", ["dense.safetensors", "serving-00001.safetensors", "trainer.safetensors", "manifest.json"])
@pytest.mark.parametrize("fault", ["cut request", "cut answer"])
def test_a_connection_that_is_cut_costs_a_request_and_no_version(place: Place, fault: Fault, name: str) -> None:
    """The answer can get lost after the store has done it: then the writer finds its own file, and goes on.

    Who repeats the request, obstore or nobody, is its affair.
    """
    store = at(place.url)
    place.proxy.fail(fault, times=1, name=name)
    write(store, 1)
    assert is_whole(store, 1, 1.0)
    assert place.proxy.count("PUT", name) >= (2 if fault == "cut request" else 1)


def test_an_answer_that_ends_in_the_middle_is_never_taken_for_a_file(place: Place) -> None:
    store = at(place.url)
    write(store, 1)
    place.proxy.fail("half answer", times=1, method="GET", name="serving-00001.safetensors")
    assert is_whole(store, 1, 1.0)
    place.proxy.fail("half answer", times=10**6, method="GET", name="serving-00001.safetensors")
    with pytest.raises(SnapshotError, match=r"can't read .*serving-00001\.safetensors"):
        store.serving(1)


@pytest.mark.parametrize("name", FILES)
def test_a_store_that_refuses_gets_no_rest_of_a_version(bucket: Place, name: str) -> None:
    store = at(bucket.url)
    bucket.proxy.fail("forbidden", times=10**6, name=name)
    with pytest.raises(SnapshotError, match=rf"can't write .*{name}: .*Check that the store exists and that this process may"):
        write(store, 1)
    assert store.numbers() == [] and bucket.proxy.count("PUT", name) == 1


def test_a_store_that_goes_away_with_the_answer_to_the_manifest_keeps_a_whole_version(bucket: Place) -> None:
    """Nobody knows then whether the version exists. It isn't announced; what is there is whole or no version."""
    store = at(bucket.url)
    gone = threading.Event()

    def plan(request: Request) -> Fault | None:
        if gone.is_set():
            return "unavailable"
        if request.method == "PUT" and request.path.endswith("manifest.json"):
            gone.set()
            return "cut answer"
        return None

    bucket.proxy.plan = plan
    with pytest.raises(SnapshotError, match=r"can't write .*manifest\.json"):
        write(store, 1)
    bucket.proxy.plan = lambda request: None
    assert store.versions() == [1] and is_whole(store, 1, 1.0)


def test_a_slow_store_is_no_time_out(bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is for one request, and a version takes many: here twice as long as one request may."""
    monkeypatch.setattr("state.object_store.REQUEST_S", 2)
    bucket.proxy.before_answer = lambda request: time.sleep(0.2)
    store = at(bucket.url)
    began = time.monotonic()
    write(store, 1)
    assert time.monotonic() - began > 2
    bucket.proxy.before_answer = lambda request: None
    assert is_whole(store, 1, 1.0)


def test_a_store_that_never_answers_is_given_up(bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("state.object_store.REQUEST_S", 0.5)
    never = threading.Event()
    bucket.proxy.before_answer = lambda request: never.wait(20) and None
    try:
        with pytest.raises(SnapshotError, match="snapshot store: can't"):
            at(bucket.url).versions()
    finally:
        never.set()


@pytest.mark.parametrize("fault", ["ignore condition", "reject condition"])
def test_without_conditional_puts_a_number_is_written_once_all_the_same(
    bucket: Place, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.proxy.plan = lambda request: fault
    store = at(bucket.url)
    write(store, 1, 1.0)
    assert "ignores or rejects the condition of a write (If-None-Match)" in caplog.text
    write(store, 2, 2.0)
    assert sum(each.conditional for each in bucket.proxy.requests) <= 2  # it was tried once
    with pytest.raises(SnapshotExists):
        write(at(bucket.url), 1, 3.0)
    assert is_whole(store, 1, 1.0) and is_whole(store, 2, 2.0)
    bucket.proxy.fail("forbidden", times=1, name="trainer.safetensors")
    bucket.proxy.plan = _either(bucket.proxy.plan, fault)
    with pytest.raises(SnapshotError):
        write(store, 3)
    assert store.numbers() == [1, 2]


def _either(plan: Callable[[Request], Fault | None], otherwise: Fault) -> Callable[[Request], Fault | None]:
    return lambda request: plan(request) or otherwise


@pytest.mark.parametrize("name", FILES)
def test_without_conditional_puts_readers_notice_what_two_writers_damaged(bucket: Place, name: str) -> None:
    """Both look at a name at the same moment, and see nothing. Where that ends badly, no reader takes it for a version."""
    bucket.proxy.plan = lambda request: "ignore condition"
    first, second = at(bucket.url), at(bucket.url)
    write(first, 1)
    write(second, 2)  # both have tried the store by now
    meanwhile: list[Exception | None] = []

    def on_look(request: Request) -> None:
        if request.method == "HEAD" and request.path.endswith(f"3/{name}") and not meanwhile:
            meanwhile.append(None)
            try:
                write(second, 3, 2.0)
            except SnapshotError as error:
                meanwhile[0] = error

    bucket.proxy.before_answer = on_look
    outcomes = []
    try:
        write(first, 3, 1.0)
        outcomes.append(1.0)
    except SnapshotError:
        pass
    assert meanwhile
    outcomes += [2.0] if meanwhile[0] is None else []
    if 3 not in first.versions():
        return
    try:
        assert any(is_whole(first, 3, value) for value in outcomes)
    except SnapshotCorrupt:
        assert first.verify(3) != []


def test_without_credentials_the_error_names_the_variables(bucket: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", bucket.proxy.address)  # where a machine's own role would be asked for
    bucket.proxy.plan = lambda request: "forbidden"
    with pytest.raises(
        SnapshotError, match=r"no credentials in the environment .*Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    ):
        at(bucket.url).versions()


def test_without_an_account_the_error_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SnapshotError, match=r"no credentials in the environment .*Set AZURE_STORAGE_ACCOUNT_NAME"):
        at("az://container/prefix").versions()


def test_wrong_credentials_are_said_to_be_wrong(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("s3") / "authorized"
    with s3_server(folder, authorized=True) as address:
        (folder / "buckets" / "bucket").mkdir()
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", S3_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
        write(at("s3://bucket/x"), 1)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another one")
        with pytest.raises(SnapshotError, match=r"credentials that it doesn't accept .*Correct AWS_ACCESS_KEY_ID"):
            at("s3://bucket/x").versions()
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", S3_SECRET)
        with pytest.raises(SnapshotError, match=r"can't write .*no-such-bucket"):
            write(at("s3://no-such-bucket/x"), 1)
        assert is_whole(at("s3://bucket/x"), 1, 1.0)


def test_what_is_deleted_while_it_is_read_is_not_called_damaged(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = at(place.url)
    store.write(Manifest(version=1), serving(1.0, 40), trainer(1.0, 40))
    rows = store.read(1).rows()
    assert len(next(rows)) == 2
    store.delete(1)
    with pytest.raises(SnapshotNotFound, match="version 1 was deleted while it was read"):
        list(rows)


@pytest.mark.parametrize("survivors", [0, 1, 4, 8])
def test_a_deletion_that_ends_early_is_ended_later(bucket: Place, survivors: int) -> None:
    store = at(bucket.url)
    write(store, 1)
    deleted = [0]

    def plan(request: Request) -> Fault | None:
        if request.method not in ("DELETE", "POST"):
            return None
        deleted[0] += 1
        return "forbidden" if deleted[0] > len(FILES) - survivors else None

    bucket.proxy.plan = plan
    if survivors:
        with pytest.raises(SnapshotError, match="can't delete"):
            store.delete(1)
        assert store.numbers() == [1]
    else:
        store.delete(1)
    assert store.versions() == []  # the manifest went first
    bucket.proxy.plan = lambda request: None
    store.delete(1)
    assert store.numbers() == []
