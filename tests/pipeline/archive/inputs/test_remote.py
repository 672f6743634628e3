"""Slides at URLs, on a stand-in for S3 on this machine: the results are those of the same files on a disk."""

import contextlib
import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import obstore
import pytest
from obstore.store import S3Store
from PIL import Image

import oracle
from dicom_files import write
from oracle import chosen, files, paint
from pipeline import cli
from pipeline.archive import run as archive_run
from pipeline.archive.inputs import remote
from pipeline.archive.inputs.remote import RemoteFolder, RemoteSlide, locate, without_secrets
from pipeline.archive.inputs.sources import find_slides
from pipeline.config import Execution
from pipeline.errors import ConfigError, RunError, SlideChanged
from pipeline.files import with_checksum
from pipeline.segment.record import SlideRecord
from slides.errors import SlideNotFound, SlideUnreadable

run = functools.partial(archive_run.run, mpp=0.25, detect=oracle.detect)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of moto's server, a process of its own."""
    log = tmp_path_factory.mktemp("moto") / "log"
    command = [sys.executable, "-u", "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with log.open("wb") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        try:
            while (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) is None:
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            yield found[0]
        finally:
            process.kill()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> S3Store:
    """An empty bucket, which the environment gives access to."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "an-id",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket{abs(hash(request.node.name))}"
    urllib.request.urlopen(urllib.request.Request(f"{server}/{name}", method="PUT")).close()
    return S3Store(name)


def url(bucket: S3Store, key: str = "") -> str:
    return f"s3://{bucket.config['bucket']}/{key}"


def put(bucket: S3Store, key: str, content: Path | bytes) -> None:
    obstore.put(bucket, key, content if isinstance(content, bytes) else content.read_bytes())


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide with a suffix that is searched for."""
    folder = tmp_path_factory.mktemp("slide")
    paint(folder / "discs.png", 0)
    with Image.open(folder / "discs.png") as picture:
        picture.save(folder / "discs.tif")
    return folder / "discs.tif"


def staged(tmp_path: Path) -> Execution:
    return Execution(cluster=False, workers=3, stage=str(tmp_path / "stage"))


def test_a_folder_in_a_bucket_gives_the_bytes_of_the_same_folder_on_a_disk(
    bucket: S3Store, slide: Path, tmp_path: Path
) -> None:
    names = ("x.tif", "deep/y.tif", "notes.txt", ".Trash-1/z.tif", "m/Slidedat.ini", "m/in/a.tif", "._x.tif")
    for name in names:
        put(bucket, f"site/{name}", slide)
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_bytes(slide.read_bytes())
    put(bucket, "site2/other.tif", slide)
    said: list[str] = []
    local = run([tmp_path / "site"], tmp_path / "local", chosen(), staged(tmp_path), say=print)
    rows = run([url(bucket, "site/")], tmp_path / "out", chosen(), staged(tmp_path), say=said.append)
    assert [(row.slide, row.status) for row in rows] == [("deep/y", "done"), ("x", "done")]
    assert [(row.slide, row.nuclei) for row in rows] == [(row.slide, row.nuclei) for row in local]
    for name in ("deep/y", "x"):
        assert files(tmp_path / "out" / name) == files(tmp_path / "local" / name)
    about = json.loads((tmp_path / "out" / "x" / "slide.json").read_text())
    head = obstore.head(bucket, "site/x.tif")
    assert about["source_path"] == url(bucket, "site/x.tif")
    assert (about["source"], about["source_bytes"]) == ("x.tif", head["size"])
    assert about["source_mtime_ns"] == head["last_modified"].timestamp() * 1e9
    assert list((tmp_path / "stage").iterdir()) == []
    again = run([url(bucket, "site")], tmp_path / "out", chosen(), staged(tmp_path), say=said.append)
    assert [row.status for row in again] == ["done before"] * 2
    assert sum("copied" in line for line in said) == 2
    for file in [*tmp_path.glob("out/*.*"), *tmp_path.glob("out/logs/*")]:
        assert b"a-secret" not in file.read_bytes()


def test_folders_of_a_run_and_of_a_mirax_slide_are_searched_in_a_bucket_as_on_a_disk(
    bucket: S3Store, slide: Path, tmp_path: Path
) -> None:
    names = ("a.tif", "old/run.json", "old/ledger.csv", "old/a/density/density.ome.tif", "half/run.json", "half/b.tif")
    for name in (*names, "m/SLIDEDAT.INI", "m/in/c.tif", "@eaDir/d.tif", "deep/M/Slidedat.ini", "deep/M/e.tif"):
        put(bucket, f"site/{name}", slide)
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).touch()
    local, there = find_slides([tmp_path / "site"]), find_slides([url(bucket, "site")], urls=True)
    assert [source.name for source in there.sources] == [source.name for source in local.sources] == ["a", "half/b"]
    assert [said.replace(url(bucket), f"{tmp_path}/") for said in there.unread] == list(local.unread)
    assert len(local.unread) == 1
    for folder in ("site/m", "site/old"):  # itself is what nobody searches
        for inputs, urls in ([tmp_path / folder], False), ([url(bucket, folder)], True):
            with pytest.raises(RunError, match="no slides in"):
                find_slides(inputs, urls=urls)


def test_a_key_that_cannot_be_listed_is_named_with_the_remedy(
    bucket: S3Store, server: str, slide: Path, tmp_path: Path
) -> None:
    """Two slashes in a row, which obstore takes for no path: what lies beside it can be given."""
    put(bucket, "site/deep/x.tif", slide)
    strange = urllib.request.Request(f"{server}/{bucket.config['bucket']}/site/a//y.tif", b"1", method="PUT")
    urllib.request.urlopen(strange).close()
    with pytest.raises(SlideUnreadable, match=r"site/ cannot be read .*site/a//y\.tif.*: rename what has such a name"):
        run([url(bucket, "site")], tmp_path / "out", chosen(), staged(tmp_path), say=print)
    (row,) = run([url(bucket, "site/deep")], tmp_path / "out", chosen(), staged(tmp_path), say=print)
    assert (row.slide, row.status) == ("x", "done")


def test_a_slide_that_was_uploaded_again_is_done_and_another_one_is_refused(
    bucket: S3Store, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, "x.tif", slide)
    what = [url(bucket, "x.tif")], tmp_path / "out", chosen(), staged(tmp_path)
    assert run(*what, say=print)[0].status == "done"
    slide_json = tmp_path / "out" / "x" / "slide.json"
    changed = with_checksum({**json.loads(slide_json.read_text()), "source_mtime_ns": 1})
    slide_json.write_text(json.dumps(changed))
    assert run(*what, say=print)[0].status == "done before"
    paint(tmp_path / "other.png", 1)
    put(bucket, "x.tif", tmp_path / "other.png")
    (row,) = run(*what, say=print)
    assert row.status == "done otherwise"
    assert "x.tif is not the file that these results are of" in row.cause


def test_a_scale_that_is_not_forced_any_more_is_noticed(bucket: S3Store, slide: Path, tmp_path: Path) -> None:
    """What the slide states is known once it was copied; where the scale is given as before it need not be."""
    stating, said = tmp_path / "x.tif", list[str]()
    Image.open(slide).save(stating, resolution=39_000, resolution_unit=3)  # a centimetre: 0.256 um
    put(bucket, "x.tif", stating)

    def again(force_mpp: float | None = None) -> SlideRecord:
        what = [url(bucket, "x.tif")], tmp_path / "out", chosen(), staged(tmp_path)
        (row,) = archive_run.run(*what, say=said.append, detect=oracle.detect, force_mpp=force_mpp)
        return row

    assert again(force_mpp=0.25).status == "done"
    assert again(force_mpp=0.25).status == "done before"
    assert sum("copied" in line for line in said) == 1
    assert again().cause.startswith("it was done at mpp=0.25, now mpp=0.256")
    assert sum("copied" in line for line in said) == 2


def test_slides_of_several_files_are_copied_with_all_of_them(bucket: S3Store, shared: Path, tmp_path: Path) -> None:
    mirax = shared / "slides" / "mirax-sparse.mrxs"
    for path in (mirax, *mirax.with_suffix("").iterdir()):
        put(bucket, f"a/{path.relative_to(mirax.parent)}", path)
    for name, series, level in (("1.dcm", "1.2.3", 0), ("2.dcm", "1.2.3", 1), ("3.dcm", "1.2.4", 0)):
        put(bucket, f"a/d/{name}", write(tmp_path / name, series, level=level))
    archive = find_slides([url(bucket, "a")], urls=True)
    assert [source.name for source in archive.sources] == ["d/1", "d/3", "mirax-sparse"]
    parts = [[part.name for part in source.files.parts()] for source in archive.sources]
    assert parts[:2] == [["1.dcm", "2.dcm"], ["3.dcm"]]
    assert parts[2] == [
        "mirax-sparse.mrxs",
        *(f"mirax-sparse/{n}" for n in ("Data0000.dat", "Index.dat", "Slidedat.ini")),
    ]
    for part in archive.sources[2].files.parts():
        content = b"".join(archive.sources[2].files.pieces(part))
        assert content == (mirax.parent / part.name).read_bytes()


def test_a_large_file_is_read_in_pieces(bucket: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(1050)
    put(bucket, "x.svs", content)
    monkeypatch.setattr(remote, "_PIECE", 100)
    found = locate(url(bucket, "x.svs"))
    assert isinstance(found, RemoteSlide)
    (part,) = found.parts()
    pieces = list(found.pieces(part))
    assert {len(piece) for piece in pieces} == {100, 50}
    assert b"".join(pieces) == content
    reading = found.pieces(part)
    next(reading)
    put(bucket, "x.svs", os.urandom(1050))
    with pytest.raises(SlideChanged, match="changed while it was copied"):
        list(reading)


def test_a_manifest_may_name_urls(
    bucket: S3Store, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what is not there is no path in it either
    put(bucket, "a/x.tif", slide)
    rows = [f" {url(bucket, 'a/x.tif')} ,0.5", f"{url(bucket, 'a/none.tif')},", f"{url(bucket, 'a')},", f"{slide},"]
    (tmp_path / "list.csv").write_text("\n".join(["path,mpp", *rows]))
    archive = find_slides([tmp_path / "list.csv"], urls=True)
    sources = {source.name: source for source in archive.sources}
    assert set(sources) == {"x", "none", "a", "discs"}
    assert (sources["x"].scale.mpp, sources["x"].problem) == (0.5, "")
    assert sources["x"].place == url(bucket, "a/x.tif")
    assert "no file" in sources["none"].problem
    assert "no file" in sources["a"].problem
    assert sources["discs"].remote is None


def test_urls_of_several_files_that_have_one_name_without_their_secrets_are_refused(
    bucket: S3Store, server: str, slide: Path, tmp_path: Path
) -> None:
    """Such as two versions in S3: without a word, the second was not done. Of one file, signatures may differ."""
    name, s3 = bucket.config["bucket"], boto3.client("s3", endpoint_url=server)
    s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    contents = (slide.read_bytes() + bytes(more) for more in (0, 1))
    uploaded = [s3.put_object(Bucket=name, Key="x.tif", Body=content, ACL="public-read") for content in contents]
    versions = [f"{server}/{name}/x.tif?versionId={answer['VersionId']}" for answer in uploaded]
    (tmp_path / "list.csv").write_text("\n".join(["path", *versions]))
    for inputs in (versions, versions[::-1], tmp_path / "list.csv"):
        (source,) = find_slides(inputs, urls=True).sources
        assert source.problem.startswith(f"{server}/{name}/x.tif has several URLs, of files that differ")
    signed = [f"{versions[0]}&X-Amz-Signature={signature}" for signature in ("one", "other")]
    (source,) = find_slides(signed, urls=True).sources
    assert source.problem == ""


# ------------------------------------------------------------------------------------------- servers that go wrong

Answer = tuple[int, dict[str, str], bytes]  # status, headers, content


@contextlib.contextmanager
def serving(
    answer: Callable[[str, slice | None], Answer], by_path: Callable[[str], Answer] | None = None
) -> Iterator[str]:
    """The address of a web server; answer: of a method and the range that is asked for, or by_path: of the path."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            part = slice(int(wanted[1]), int(wanted[2]) + 1) if wanted else None
            status, headers, content = by_path(self.path) if by_path else answer(self.command, part)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def whole_or_part(content: bytes, part: slice | None) -> Answer:
    if part is None:
        return 200, {}, content
    return 206, {"Content-Range": f"bytes {part.start}-{part.stop - 1}/{len(content)}"}, content[part]


def test_a_server_that_is_away_for_a_while_is_waited_for(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore gave up within three seconds: each slide failed that came to be copied meanwhile."""
    quick = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2}
    monkeypatch.setitem(remote._PATIENCE, "backoff", quick)
    content, asked = slide.read_bytes(), []

    def answer(method: str, part: slice | None) -> Answer:
        asked.append(method)
        return (503, {}, b"") if 3 < len(asked) < 50 else whole_or_part(content, part)

    with serving(answer) as address:
        (row,) = run(f"{address}/x.tif", tmp_path / "out", chosen(), staged(tmp_path), say=lambda line: None)
    assert (row.status, row.cause) == ("done", "")
    assert len(asked) > 50


def test_the_urls_of_a_manifest_are_asked_for_at_once_by_few_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand took a quarter of an hour, one after the other. Each has its own answer, as it had alone."""
    asked, most, lock = 0, 0, threading.Lock()
    clients, from_url = list[str](), obstore.store.from_url

    def sizes(path: str) -> Answer:
        nonlocal asked, most
        with lock:
            asked += 1
            most = max(most, asked)
        time.sleep(0.05)
        with lock:
            asked -= 1
        number = int(path.removeprefix("/x").removesuffix(".tif"))
        return (404 if number % 10 == 3 else 200), {"Content-Length": str(1000 + number)}, b""

    def counted(root: str, **options: Any) -> Any:
        clients.append(root)
        return from_url(root, **options)

    monkeypatch.setattr(obstore.store, "from_url", counted)
    with serving(lambda method, part: (500, {}, b""), by_path=sizes) as address:
        paths = [f"{address}/x{number}.tif" for number in range(100)]
        (tmp_path / "list.csv").write_text("\n".join(["path", *paths, *paths[:5]]))
        sources = {source.name: source for source in find_slides(tmp_path / "list.csv", urls=True).sources}
        assert 1 < most <= 16
        assert sorted(sources) == sorted(f"x{number}" for number in range(100))
        for number in range(100):
            source = sources[f"x{number}"]
            if number % 10 == 3:
                assert source.problem == f"{address}/x{number}.tif: there is no such file"
            else:
                assert (source.problem, source.files.origin().bytes) == ("", 1000 + number)
    assert len(clients) <= 2 * 16  # threads that come at the same time may each make two


def test_a_server_that_does_not_answer_at_first_is_told_soon() -> None:
    asked = []

    def answer(method: str, part: slice | None) -> Answer:
        asked.append(method)
        return 503, {}, b""

    with serving(answer) as address, pytest.raises(RunError, match="503"):
        locate(f"{address}/x.tif")
    assert len(asked) < 20


def test_a_file_of_a_store_is_read_from_any_place() -> None:
    """As one on a disk. A server that has no tag for it has an empty one."""
    content = bytes(range(256)) * 1000
    with serving(lambda method, part: whole_or_part(content, part)) as address:
        at = locate(f"{address}/x.svs")
        assert isinstance(at, RemoteSlide)
        assert at.origin().etag == ""
        with at.folder.open("x.svs") as file:
            assert file.read(3) == content[:3]
            assert (file.seek(100_000), file.read(5)) == (100_000, content[100_000:100_005])
            assert (file.seek(-50_000, os.SEEK_CUR), file.read(5)) == (50_005, content[50_005:50_010])
            assert (file.seek(-4, os.SEEK_END), file.read()) == (len(content) - 4, content[-4:])
            assert file.read(1) == b""


@pytest.mark.parametrize("sent", [-10, 10])
def test_a_server_that_sends_another_number_of_bytes_is_named(sent: int, slide: Path) -> None:
    content = slide.read_bytes()

    def answer(method: str, part: slice | None) -> Answer:
        status, headers, whole = whole_or_part(content, part)
        return status, headers, (whole + bytes(10))[: len(whole) + sent] if part else whole

    with serving(answer) as address:
        at = locate(f"{address}/x.tif")
        assert isinstance(at, RemoteSlide)
        message = rf"/x\.tif cannot be read: of bytes 0 to 100 the server sent {100 + sent}: download the slide"
        with pytest.raises(SlideUnreadable, match=message):
            at.folder.read(at.folder.entry("x.tif"), 0, 100)


def test_a_file_that_is_replaced_before_it_is_copied_is_noticed_by_its_tag() -> None:
    """Of the same size, by a server that does not say when, or within the second that a store says: of a slide of
    several files, a copy would hold some from before and some from after.
    """
    content = [b"before", b"after."]

    def answer(method: str, part: slice | None) -> Answer:
        status, headers, sent = whole_or_part(content[0], part)
        return status, {**headers, "ETag": f'"{content[0].decode()}"'}, sent

    with serving(answer) as address:
        at = locate(f"{address}/x.svs")
        assert isinstance(at, RemoteSlide)
        (part,) = at.parts()
        assert b"".join(at.pieces(part)) == b"before"
        content.pop(0)
        with pytest.raises(SlideChanged, match=r"/x\.svs changed while it was copied: run the same command again"):
            list(at.pieces(part))


def test_a_server_without_byte_ranges_is_named_with_the_remedy(slide: Path) -> None:
    with serving(lambda method, part: (200, {}, slide.read_bytes())) as address:
        at = locate(f"{address}/x.tif")
        assert isinstance(at, RemoteSlide)
        with pytest.raises(SlideUnreadable, match=r"Range.*: log in, or download the slide and give the file"):
            at.folder.read(at.folder.entry("x.tif"), 0, 100)


# -------------------------------------------------------------------------------------------- refusals and secrets


@pytest.mark.parametrize("sign", "/?#")
@pytest.mark.parametrize("scheme", ["https", "s3"])
def test_a_password_that_cuts_its_url_short_is_refused_without_secrets(scheme: str, sign: str) -> None:
    with pytest.raises(RunError, match=r"://host/a/x\.svs: .*password") as refused:
        locate(f"{scheme}://me:pw{sign}pw@host/a/x.svs")
    assert "pw" not in str(refused.value)
    assert "me" not in str(refused.value)


@pytest.mark.parametrize(
    ("path", "message"), [("away/x.svs", "x.svs: there is no such file"), ("", "names no file: a web server")]
)
def test_what_is_not_on_a_web_server_is_said(server: str, path: str, message: str) -> None:
    """It was taken for a folder, which a web server is asked for ten times in vain."""
    with pytest.raises(RunError, match=message):
        locate(f"{server}/{path}")


@pytest.mark.parametrize("given", ["ftp://host/x.svs", "s3://", "s3://me:pw@bucket/x.svs", "s3://bucket/x?sig=pw"])
def test_a_url_of_another_form_is_refused_without_its_secrets(given: str) -> None:
    with pytest.raises(RunError, match="need s3://BUCKET") as refused:
        locate(given)
    assert "pw" not in str(refused.value)


@pytest.mark.parametrize("place", ["s3://bucket/", "gs://bucket/", "az://bucket/", "https://host/", "http://host:80/"])
def test_the_stores_that_there_are(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "an-account")
    store, *found = remote._store(f"{place}a/x.svs", {})
    assert found == [place, "a/x.svs"]
    if place.startswith("http"):  # none at https:// leads to http://
        assert str(store.client_options["allow_http"]).lower() == str(place.startswith("http://")).lower()
    scheme, _, rest = place.partition("://")
    assert remote._store(f"{scheme.upper()}://{rest}a/x.svs/", {})[1:] == (place, "a/x.svs")


def test_a_whole_bucket_is_a_folder(bucket: S3Store, slide: Path) -> None:
    for key in ("x.tif", "deep/y.tif"):
        put(bucket, key, slide)
    folder = RemoteFolder(bucket, url(bucket), "")
    assert (folder.files(), folder.below("deep"), folder.below("none")) == (["x.tif"], ["deep/y.tif"], [])
    for given in (url(bucket), url(bucket).rstrip("/"), url(bucket, "x.tif"), url(bucket, "deep")):
        places = [source.place for source in find_slides([given], urls=True).sources]
        assert places == [
            url(bucket, key) for key in ("deep/y.tif", "x.tif") if url(bucket, key).startswith(given.rstrip("/"))
        ]


def test_what_is_not_there_or_not_allowed_is_said_without_secrets(
    bucket: S3Store, server: str, slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(bucket, "x.tif", slide)
    with pytest.raises(RunError, match=r"no slides in s3://bucket\d+/none"):
        find_slides([url(bucket, "none")], urls=True)
    (said,) = find_slides([url(bucket, "none"), url(bucket)], urls=True).unread
    assert said.startswith(f"no slides in {url(bucket, 'none')}")
    signed = f"{server}/{bucket.config['bucket']}/x.tif?X-Sig=sig-nature"
    flags = ["--stage", str(tmp_path / "stage"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", signed, *flags])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"{server}/{bucket.config['bucket']}/x.tif cannot be read (PermissionDeniedError" in said
    assert "sig-nature" not in said


def test_errors_of_the_store_have_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError) as refused, remote._asked("https://host/x", RunError):
        raise RuntimeError("GET https://u:pw@host/x?sig=pw#pw failed\n\nDebug source: uri: https://u:pw@host/x?sig=pw")
    assert "pw" not in str(refused.value)
    assert refused.value.__suppress_context__
    assert "GET https://host/x failed" in str(refused.value)
    assert "Debug" not in str(refused.value)


def test_without_secrets_keeps_the_place() -> None:
    assert without_secrets("https://u:p@host:80/a/b%20c.svs?x=1#y") == "https://host:80/a/b%20c.svs"
    assert without_secrets("s3://bucket/a@b/c.svs") == "s3://bucket/a@b/c.svs"
    assert without_secrets("https://u:p@host/a@b/c.svs") == "https://host/a@b/c.svs"
    for place in ("https://host:80/a:b/c@d.svs", "https://host/a:b/c@d.svs", "https://[::1]:80/a/c@d.svs"):
        assert without_secrets(place) == place


def test_a_slide_on_the_web_is_read_with_the_user_name_and_query_of_its_url(
    bucket: S3Store, server: str, slide: Path, tmp_path: Path
) -> None:
    """As a signed URL has; moto takes any signature."""
    name = bucket.config["bucket"]
    put(bucket, "a b/x.tif", slide)
    given = f"{server.replace('//', '//me:pass-word@')}/{name}/a%20b/x.tif?X-Amz-Signature=sig-nature"
    said: list[str] = []
    (row,) = run(given, tmp_path / "out", chosen(), staged(tmp_path), say=said.append)
    assert (row.slide, row.status) == ("x", "done"), row.cause
    (failed,) = run(given, tmp_path / "failed", chosen(), staged(tmp_path), mpp=None, say=said.append)
    assert (
        failed.cause == f"{server}/{name}/a b/x.tif states no resolution: pass --mpp (micrometres per pixel at level 0)"
    )
    written = [path.read_bytes() for out in ("out", "failed") for path in tmp_path.glob(f"{out}/**/*.*")]
    for secret in ("pass-word", "sig-nature"):
        assert not any(secret in line for line in said)
        assert not any(secret.encode() in content for content in written)
    assert f"{server}/{name}/a b/x.tif" in (tmp_path / "out" / "x" / "slide.json").read_text()


def test_urls_need_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["run", "https://u:pw@host/x.svs?sig=pw", "--out", str(tmp_path / "out")], ["plan", "s3://b/x"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "only by `nightslide run` with --stage DIR" in said
        assert "pw" not in said
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(
        ConfigError, match=re.escape('s3://bucket/x.svs needs obstore: pip install "nightslide[remote]"')
    ):
        locate("s3://bucket/x.svs")


def test_a_file_that_is_gone_is_not_found(bucket: S3Store) -> None:
    folder = RemoteFolder(bucket, url(bucket), "")
    with pytest.raises(SlideNotFound, match="there is no such file"):
        folder.entry("x.svs")
