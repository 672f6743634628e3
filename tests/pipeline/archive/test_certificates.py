"""Certificates of a cluster: strict readers take them, only the owner reads the key, nothing is overwritten."""

import contextlib
import datetime
import socket
import ssl
import stat
import sys
import threading
from pathlib import Path

import pytest

from pipeline.archive import certificates
from pipeline.archive.certificates import Certificates, write_certificates
from pipeline.archive.workers.scheduler import check_scheduler
from pipeline.config import Execution
from pipeline.errors import ConfigError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return write_certificates(tmp_path_factory.mktemp("tls") / "made", 365)


def handshake(server: Certificates, client: Certificates) -> str:
    """The TLS version that both ends agree on, each asking for the other's certificate, as strictly as OpenSSL can."""
    ends = socket.socketpair()
    contexts = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    for context, files in zip(contexts, (server, client), strict=True):
        context.load_verify_locations(files.ca)
        context.load_cert_chain(files.cert, files.key)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.maximum_version = (
            ssl.TLSVersion.TLSv1_2
        )  # in 1.3 the client's certificate is checked after its handshake

    def serve() -> None:
        with ends[0] as end, contextlib.suppress(ssl.SSLError):
            contexts[0].wrap_socket(end, server_side=True).close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with ends[1] as end, contexts[1].wrap_socket(end) as wrapped:
            return str(wrapped.version())
    finally:
        thread.join()


def test_one_certificate_is_for_both_ends_and_strangers_are_refused(made: Certificates, tmp_path: Path) -> None:
    assert handshake(made, made) == "TLSv1.2"
    other = write_certificates(tmp_path / "other", 365)
    for ends in ((made, other), (other, made)):
        with pytest.raises(ssl.SSLError):
            handshake(*ends)


def test_only_the_owner_reads_the_key(made: Certificates) -> None:
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.key.parent.stat().st_mode) == 0o700
    assert sorted(path.name for path in made.key.parent.iterdir()) == ["ca.pem", "cert.pem", "key.pem"]
    assert not any(b"PRIVATE" in path.read_bytes() for path in (made.ca, made.cert))


def test_what_is_there_is_not_overwritten(made: Certificates) -> None:
    before = made.key.read_bytes()
    with pytest.raises(ConfigError, match=r"ca\.pem.* exist already: choose another --out"):
        write_certificates(made.key.parent, 365)
    assert made.key.read_bytes() == before


def test_a_run_refuses_those_that_have_ended_and_says_so(
    made: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several authorities in a file the one that ends last counts, whatever their order."""

    def check(*authorities: bytes) -> None:
        files.ca.write_bytes(b"".join(authorities))
        check_scheduler(
            Execution(
                scheduler="tls://10.0.0.5:8786",
                tls_ca_file=str(files.ca),
                tls_cert=str(files.cert),
                tls_key=str(files.key),
            )
        )

    files = Certificates(tmp_path / "ca.pem", tmp_path / "cert.pem", tmp_path / "key.pem")
    for path, whole in zip(files, made, strict=True):
        path.write_bytes(whole.read_bytes())
    valid = made.ca.read_bytes()
    check(valid)
    monkeypatch.setattr(certificates, "_CLOCKS", datetime.timedelta(days=999))
    ended, before = (certificates._contents(days)[0] for days in (-2, -400))
    year = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)).year
    for authorities in ((ended,), (ended, before), (before, ended)):
        with pytest.raises(ConfigError, match=rf"was valid until .* {year} GMT: make new ones with `nightslide"):
            check(*authorities)
    check(valid, ended)
    check(ended, valid)


def test_wrong_usage_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_certificates(tmp_path / "file" / "below", 365)
    for days in (0, 10**9):
        with pytest.raises(ConfigError, match=f"days={days}: need 1 to 3650"):
            write_certificates(tmp_path / "new", days)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r'pip install "nightslide\[tls\]"'):
        write_certificates(tmp_path / "new", 365)
    assert not (tmp_path / "new").exists()
