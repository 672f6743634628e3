"""Certificates for a Dask cluster of several machines: its traffic is encrypted, and only their holders are let in."""

import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline import files
from pipeline.config import require
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_CLOCKS = datetime.timedelta(days=1)  # by which the clocks of machines may differ


class Certificates(NamedTuple):
    """The files that the scheduler, every worker and every client of one cluster are given. PEM."""

    ca: Path
    cert: Path
    key: Path


def write_certificates(folder: Path, days: int) -> Certificates:
    """Make an authority and one certificate for the scheduler, the workers and the clients of a cluster.

    Dask lets in whoever holds a certificate of the authority, and does not compare host names. The authority's own key
    is not kept, so nobody can issue another certificate later. The key is readable by its owner only, and so is
    `folder` where it is made.
    days: how long the certificates are valid.
    Raises ConfigError without the package cryptography, and for a folder that holds certificates or cannot be written.
    """
    made = Certificates(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    if present := [str(path) for path in made if path.exists()]:
        raise ConfigError(f"{', '.join(present)} exist already: choose another --out, or delete them first")
    require(1 <= days <= 3650, f"days={days}: need 1 to 3650")
    contents = _contents(days)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, content in zip(made, contents, strict=True):
            with files.committed(path) as partial:
                handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if path == made.key else 0o644)
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
    except OSError as error:
        raise ConfigError(
            f"--out {folder} cannot be written ({error.strerror or error}): need a folder that can"
        ) from error
    return made


def _contents(days: int) -> tuple[bytes, bytes, bytes]:
    """The certificate of a new authority, one that it signed, and the key of the latter, in PEM."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID
    except ImportError as error:
        raise ConfigError(
            'certificates need the package cryptography, which is not installed: pip install "nightslide[tls]"'
        ) from error
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = (
        _certificate("nightslide authority", authority, authority, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(authority, hashes.SHA256())
    )
    roles = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    cert = (
        _certificate("nightslide cluster", key, authority, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(roles, critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("nightslide")]), critical=False)
        .sign(authority, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return ca.public_bytes(pem), cert.public_bytes(pem), private


def _certificate(
    name: str, key: "EllipticCurvePrivateKey", authority: "EllipticCurvePrivateKey", days: int
) -> "x509.CertificateBuilder":
    """A certificate of `key`, to be signed by `authority`, with the extensions that strict readers ask for."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nightslide authority")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> "x509.KeyUsage":
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
