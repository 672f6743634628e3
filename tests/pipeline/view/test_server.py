"""The pages are for one person on this machine, and show what the run wrote."""

import http.client
import re
import signal
import socket
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from finished_run import FIRST, Finished
from pipeline import files
from pipeline.cli import main
from pipeline.layout import RunFolder
from pipeline.view.application import application
from pipeline.view.results import Results

TOKEN = "a-token_that-is-known"
PORT = 8123


def client_of(run: Path) -> TestClient:
    application_ = application(Results(RunFolder(run)), TOKEN, PORT)
    return TestClient(application_, base_url=f"http://127.0.0.1:{PORT}", follow_redirects=False)


@pytest.fixture(scope="module")
def client(finished: Finished) -> TestClient:
    return client_of(finished.run)


ADDRESSES = {
    "": "text/html",
    "slides.json": "application/json",
    "slides/0/": "text/html",
    "slides/0/about.json": "application/json",
    "slides/0/thumbnail.jpg": "image/jpeg",
    "slides/0/picture.json": "application/json",
    "slides/0/picture/9/0_0.jpg": "image/jpeg",
    "slides/0/nuclei.json": "application/json",
    "slides/0/nuclei/0_0.bin": "application/octet-stream",
    "slides/0/nuclei/0.json": "application/json",
    "slides/0/density.bin?score=0.5&class=0": "application/octet-stream",
    "static/ask.js": "text/javascript",
    "static/slides.js": "text/javascript",
    "static/slide.js": "text/javascript",
    "static/nuclei.js": "text/javascript",
    "static/view.css": "text/css",
    "static/icon.svg": "image/svg+xml",
    "static/openseadragon.min.js": "text/javascript",
}


@pytest.mark.parametrize(("address", "kind"), ADDRESSES.items())
def test_every_address_answers_with_its_type_and_the_headers(client: TestClient, address: str, kind: str) -> None:
    answer = client.get(f"/{TOKEN}/{address}")
    assert answer.status_code == 200
    assert answer.headers["content-type"].split(";")[0] == kind
    assert_guarded(answer.headers)


def assert_guarded(headers: object) -> None:
    get = headers.get  # type: ignore[attr-defined]
    policy = dict(part.strip().split(" ", 1) for part in get("content-security-policy").split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert "unsafe" not in get("content-security-policy")
    assert get("x-content-type-options") == "nosniff"
    assert get("referrer-policy") == "no-referrer"
    assert get("cache-control") == "no-store"


WRONG_TOKENS = ("", "wrong", TOKEN[:-1], f"{TOKEN}x", TOKEN.upper(), "%00", "é", "..", "*")


@pytest.mark.parametrize(
    "path", [*(f"wrong/{address}" for address in ADDRESSES), *(f"{token}/slides.json" for token in WRONG_TOKENS), ""]
)
def test_nothing_is_answered_without_the_token(client: TestClient, path: str) -> None:
    answer = client.get(f"/{path}")
    assert answer.status_code == 403
    assert "nightslide view" in answer.text
    assert_guarded(answer.headers)


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1", f"127.0.0.1:{PORT + 1}", f"127.0.0.1:{PORT}.evil", ""]
)
def test_another_host_is_refused(client: TestClient, host: str) -> None:
    """A page from elsewhere whose name was made to lead here sends its own name (DNS rebinding)."""
    answer = client.get(f"/{TOKEN}/slides.json", headers={"Host": host})
    assert answer.status_code == 403
    assert f"need 127.0.0.1:{PORT} or localhost:{PORT}" in answer.text
    assert_guarded(answer.headers)


def test_localhost_is_this_machine(client: TestClient) -> None:
    assert client.get(f"/{TOKEN}/slides.json", headers={"Host": f"localhost:{PORT}"}).status_code == 200


@pytest.mark.parametrize(
    "address",
    [
        "slides/3/",
        "slides/3/nuclei.json",
        "slides/99999999999999999999/picture.json",
        "slides/-1/picture.json",
        "slides/0/nuclei/1_0.bin",
        "slides/0/nuclei/-1_0.bin",
        "slides/0/nuclei/99999999.json",
        "slides/0/picture/10/0_0.jpg",
        "slides/0/picture/9/1_0.jpg",
        "slides/0/slide.geojson",
        "slides/2/thumbnail.jpg",
        "slides/0/../0/nuclei.json/x",
        "slides/0/slide.json",
        "slides/0/nuclei.parquet",
        "slides/..%2f..%2fetc%2fpasswd/nuclei.json",
        "slides/0/..%2f..%2fledger.geojson",
        "static/..%2fserver.py",
        "static/../server.py",
        "static//etc/passwd",
        "static/openseadragon.LICENSE.txt",
        "ledger.csv",
        "run.json",
    ],
)
def test_what_does_not_exist_and_what_is_not_served(client: TestClient, address: str) -> None:
    assert client.get(f"/{TOKEN}/{address}").status_code == 404


def test_a_request_that_makes_no_sense(client: TestClient) -> None:
    assert client.get(f"/{TOKEN}/slides/0/density.bin?score=much").status_code == 400
    assert client.get(f"/{TOKEN}/slides/0/density.bin?class=all").status_code == 400
    assert client.post(f"/{TOKEN}/slides.json").status_code == 405


def test_paths_on_the_disk_stay_there(client: TestClient, finished: Finished) -> None:
    """No answer about a slide that can be shown names a folder of this machine."""
    for address, kind in ADDRESSES.items():
        if kind == "application/json" and address != "slides.json":
            assert str(finished.slides.parent) not in client.get(f"/{TOKEN}/{address}").text


def test_the_slide_and_its_nuclei(client: TestClient, finished: Finished) -> None:
    about = client.get(f"/{TOKEN}/slides/0/about.json").json()
    assert (about["slide"], about["annotations"]) == (FIRST, ["tissue", "artefacts"])
    nuclei = client.get(f"/{TOKEN}/slides/0/nuclei.json").json()
    assert nuclei["count"] == finished.nuclei
    assert [(c["name"], c["count"]) for c in nuclei["classes"]] == [("Nucleus", finished.nuclei)]
    counts = np.frombuffer(client.get(f"/{TOKEN}/slides/0/density.bin?score=0&class=0").content, "<u4")
    assert len(counts) == nuclei["cells"][0] * nuclei["cells"][1]
    assert counts.sum() == finished.nuclei
    picture = client.get(f"/{TOKEN}/slides/0/picture.json").json()
    tile = client.get(f"/{TOKEN}/slides/0/picture/{picture['maxLevel']}/0_0.jpg").content
    assert Image.open(BytesIO(tile)).size == (picture["width"], picture["height"])


def test_outlines_of_tissue_and_artefacts_where_they_are(finished: Finished, tmp_path: Path) -> None:
    run = finished.copy(tmp_path).run
    RunFolder(run).slide(FIRST).tissue_annotation.unlink()
    RunFolder(run).slide(FIRST).artefact_annotations.write_text('{"type": "FeatureCollection", "features": []}')
    client = client_of(run)
    assert client.get(f"/{TOKEN}/slides/0/about.json").json()["annotations"] == ["artefacts"]
    assert client.get(f"/{TOKEN}/slides/0/artefacts.geojson").json()["features"] == []
    assert client.get(f"/{TOKEN}/slides/0/tissue.geojson").status_code == 404


@pytest.mark.parametrize("coordinate", ["NaN", '"x"', "null"])
def test_outlines_that_are_damaged_are_none(finished: Finished, tmp_path: Path, coordinate: str) -> None:
    run = finished.copy(tmp_path).run
    folder = RunFolder(run).slide(FIRST)
    ring = f"[[[0, 0], [9, 0], [9, {coordinate}], [0, 0]]]"
    folder.artefact_annotations.write_text(
        '{"type": "FeatureCollection", "features": [{"type": "Feature", "properties": {}, '
        f'"geometry": {{"type": "Polygon", "coordinates": {ring}}}}}]}}'
    )
    assert client_of(run).get(f"/{TOKEN}/slides/0/artefacts.geojson").status_code in (404, 409)
    content = files.read_json(folder.slide_json)
    assert content is not None
    files.write_json(folder.slide_json, {**content, "bounds": ["x", *content["bounds"][1:]]})
    assert client_of(run).get(f"/{TOKEN}/slides/0/artefacts.geojson").status_code == 404


def test_what_is_wrong_with_a_slide_is_said(finished: Finished, tmp_path: Path) -> None:
    """The picture is shown where the table is damaged, and the nuclei where the slide has moved."""
    run = finished.copy(tmp_path).run
    folder = RunFolder(run).slide(FIRST)
    content = files.read_json(folder.slide_json)
    assert content is not None
    client = client_of(run)
    folder.nuclei.write_bytes(folder.nuclei.read_bytes()[:-50])
    answer = client.get(f"/{TOKEN}/slides/0/nuclei.json")
    assert answer.status_code == 409
    assert "run the slide again with --overwrite" in answer.json()["problem"]
    assert client.get(f"/{TOKEN}/slides/0/picture/9/0_0.jpg").status_code == 200
    files.write_json(folder.slide_json, {**content, "source_path": str(tmp_path / "gone.png")})
    answer = client.get(f"/{TOKEN}/slides/0/picture.json")
    assert answer.status_code == 409
    assert "--slides DIR" in answer.json()["problem"]


def test_a_damaged_thumbnail_is_none(finished: Finished, tmp_path: Path) -> None:
    run = finished.copy(tmp_path).run
    RunFolder(run).slide(FIRST).thumbnail.write_bytes(b"\xff\xd8\xff")
    assert client_of(run).get(f"/{TOKEN}/slides/0/thumbnail.jpg").status_code == 404


# ------------------------------------------------------------------------------------------------ the command


def started(*tokens: str) -> tuple[subprocess.Popen[str], re.Match[str]]:
    """The command, as a process that listens, and its address: port and token."""
    code = "from pipeline.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "view", *tokens], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    address = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]{40,})/", process.stdout.readline())
    assert address is not None, process.communicate()
    return process, address


def test_the_command_prints_its_address_and_ends_cleanly(finished: Finished) -> None:
    process, address = started(str(finished.run))
    try:
        connection = http.client.HTTPConnection("127.0.0.1", int(address[1]))
        connection.request("GET", f"/{address[2]}/slides.json")
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)  # while the connection is open
        out, err = process.communicate(timeout=60)
        connection.close()
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "ended\n", "")


def test_every_start_has_a_token_of_its_own_and_no_other_machine_is_let_in(finished: Finished) -> None:
    process, address = started(str(finished.run))
    other, other_address = started(str(finished.run))
    try:
        assert address[2] != other_address[2]
        if Path("/proc/net/tcp").is_file():
            listening = [line.split()[1] for line in Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]]
            assert f"0100007F:{int(address[1]):04X}" in listening
            assert f"00000000:{int(address[1]):04X}" not in listening
    finally:
        for each in (process, other):
            each.kill()
            each.communicate()


def said(capsys: pytest.CaptureFixture[str], *tokens: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        main(["view", *tokens])
    return ended.value.code, capsys.readouterr().err


def test_a_port_in_use(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, err = said(capsys, str(finished.run), "--port", str(port))
    assert status == 2
    assert re.fullmatch(rf"nightslide: port={port} cannot be used \(.*\): need one that is free; .*--port.*\n", err)


@pytest.mark.parametrize("port", [-1, 65536])
def test_no_port(finished: Finished, capsys: pytest.CaptureFixture[str], port: int) -> None:
    assert said(capsys, str(finished.run), "--port", str(port)) == (
        2,
        f"nightslide: port={port}: need 1 to 65535, or 0 for a free one\n",
    )


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, err = said(capsys, str(tmp_path))
    assert status == 2
    assert "need the --out folder of a run" in err


def test_without_the_extra(
    finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, err = said(capsys, str(finished.run))
    assert status == 2
    assert err == (
        'nightslide: the viewer needs the package uvicorn, which is not installed: pip install "nightslide[view]"\n'
    )
