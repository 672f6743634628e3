"""Slides on object stores and web servers, by URL: s3://bucket/key, gs://bucket/key, az://container/key, https://...

obstore reads them (extra `remote`), with its own credentials from the environment. A slide is never opened there: its
files are listed, and read in pieces into a copy on a disk (`pipeline.archive.inputs.staging`).

Law: a user name, password, query or fragment of a URL, which may be a secret, is in no message and no result.
"""

import contextlib
import io
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, BinaryIO, NamedTuple, Self
from urllib.parse import unquote, urlsplit

from pipeline.errors import ConfigError, RunError, SlideChanged
from pipeline.segment.job import Origin, Part
from pipeline.text import one_line
from slides.errors import NightslideError, SlideNotFound, SlideUnreadable
from slides.parts import parts

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKETS, _WEB = ("s3", "gs", "az"), ("https", "http")
_NEED = "need s3://BUCKET/..., gs://BUCKET/..., az://CONTAINER/... or https://HOST/..."

# A user name and a password that holds one of "/?#", which ends the host of a URL. Digits up to there are a port.
_CUT_PASSWORD = re.compile(r"\A[^/?#@\[]*:(?!\d*(?:[/?#]|$))[^/?#@]*[/?#].*@", re.DOTALL)

_PIECE = 8 * 2**20  # bytes of a request, held in memory; obstore ends a request after 30 s, so 0.3 MB/s are enough
_PATIENCE: Any = {  # with a store that has answered: of itself obstore tries ten times, within some three seconds
    "max_retries": 1000,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(seconds=1), "max_backoff": timedelta(seconds=15), "base": 2},
}
_HEADER = 2**16  # bytes that are read ahead of a DICOM header
_ASKED_AT_ONCE = 16  # URLs of a manifest: each answer takes a while to come, and a server may refuse many more


def is_url(given: object) -> bool:
    return _URL.match(str(given)) is not None


def without_secrets(url: str) -> str:
    """A URL without user name, password, query and fragment; the password may hold what a URL must not."""
    scheme, _, rest = url.partition("://")
    place = re.split(r"[?#]", _CUT_PASSWORD.sub("", rest), maxsplit=1)[0]
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


class Entry(NamedTuple):
    """A file of a store: its key, its size and date, and a tag that changes with its content, if the store has one."""

    key: str
    bytes: int
    mtime_ns: int
    etag: str

    @classmethod
    def of(cls, meta: Any) -> Self:
        """From what obstore says of a file."""
        mtime_ns = int(meta["last_modified"].timestamp() * 10**9)
        return cls(meta["path"], meta["size"], mtime_ns, meta["e_tag"] or "")


Stores = dict[tuple[str, bool], Any]
"Clients of obstore that are used again: each has connections of its own. By what they are asked for in `_store`."


def locate_each(urls: Iterable[str]) -> "dict[str, RemoteFolder | RemoteSlide | RunError]":
    """What `locate` returns for each URL, or the RunError that it raises. Several are asked at once.

    Raises ConfigError where obstore is not installed.
    """
    stores: Stores = {}

    def located(url: str) -> "RemoteFolder | RemoteSlide | RunError":
        try:
            return locate(url, stores)
        except RunError as error:
            return error

    once = list(dict.fromkeys(urls))
    threads = ThreadPoolExecutor(_ASKED_AT_ONCE)
    try:
        return dict(zip(once, threads.map(located, once), strict=True))
    finally:
        threads.shutdown(cancel_futures=True)  # after Ctrl-C, too


def locate(url: str, stores: Stores | None = None) -> "RemoteFolder | RemoteSlide":
    """The slide at a URL, or else the folder, which only stores have: all that is stored below it.

    stores: that may be used, and to which those are added that are made for this URL.
    Raises RunError for a URL that cannot be used or does not answer; ConfigError where obstore is not installed.
    """
    stores = {} if stores is None else stores
    asked, place, key = _store(url, stores)
    store, _, _ = _store(url, stores, patient=True)
    folder, _, name = key.rpartition("/")
    above = f"{folder}/" if folder else ""
    slide, first = (RemoteSlide(RemoteFolder(each, place, above), name) for each in (store, asked))
    on_the_web = place.startswith(tuple(f"{scheme}://" for scheme in _WEB))
    if on_the_web and not name:
        raise RunError(f"{place} names no file: a web server does not list its slides, give the URL of each")
    try:
        if name:
            try:
                first.origin()  # an address that is wrong is told soon
                return slide
            except SlideNotFound:
                if on_the_web:
                    raise
        return RemoteFolder(store, place, f"{key}/" if key else "")
    except NightslideError as error:
        raise RunError(str(error)) from None


def _store(url: str, stores: Stores, *, patient: bool = False) -> tuple[Any, str, str]:
    """The store of a URL; its place, a URL without secrets that ends with "/"; and the key that the URL names.

    patient: whether it is asked again for `_PATIENCE` where it does not answer; else for as long as obstore does
    """
    match = _URL.fullmatch(url)
    scheme, rest = (match[1].lower(), match[2]) if match else ("", "")
    shown = without_secrets(url)
    if scheme not in _BUCKETS + _WEB:
        raise RunError(f"{shown}: {_NEED}")
    if _CUT_PASSWORD.match(rest):
        raise RunError(f"{shown}: a password holds one of / ? #: write it as %2F, %3F or %23")
    try:
        from obstore.store import from_url
    except ImportError:
        raise ConfigError(f'{shown} needs obstore: pip install "nightslide[remote]"') from None
    options: Any
    if scheme in _BUCKETS:
        root, _, key = rest.partition("/")
        if not root or "@" in root or "?" in rest:
            raise RunError(f"{shown}: {_NEED}, without user name and query: credentials are read from the environment")
        root = f"{scheme}://{root}"
        place, options = f"{root}/", None
    else:
        parsed = urlsplit(url)
        key, root = unquote(parsed.path).lstrip("/"), parsed._replace(path="", fragment="").geturl()
        place, options = without_secrets(f"{scheme}://{parsed.netloc}/"), {"allow_http": scheme == "http"}
    with _asked(place, RunError):
        if (root, patient) not in stores:
            retry = _PATIENCE if patient else None
            stores[root, patient] = from_url(root, client_options=options, retry_config=retry)
    return stores[root, patient], place, key.rstrip("/")


@contextlib.contextmanager
def _asked(url: str, refused: type[NightslideError] = SlideUnreadable) -> Iterator[None]:
    """Turn what obstore raises into an error of ours: its own shows the URL that was asked, with all secrets."""
    try:
        yield
    except NightslideError:
        raise
    except FileNotFoundError:
        raise SlideNotFound(f"{url}: there is no such file") from None
    except Exception as error:
        cause = one_line(error).partition(" Debug source:")[0]
        cause = re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"']+", lambda found: without_secrets(found[0]), cause)
        remedy = "are the address and the credentials in the environment right?"
        if type(error).__name__ == "NotSupportedError":  # it sends a whole file, or a page to log in, for a part of one
            remedy = "log in, or download the slide and give the file"
        if type(error).__name__ == "InvalidPathError":  # it ends a listing, whatever else is there
            remedy = "rename what has such a name there, or give the slides and folders beside it as inputs"
        raise refused(f"{url} cannot be read ({type(error).__name__}: {cause}): {remedy}") from None


@dataclass(frozen=True)
class RemoteFolder:
    """All that lies below a key of a store, as a `Directory`; key: "" or a path that ends with "/"."""

    store: Any
    place: str  # of the store, for messages and results: a URL without secrets that ends with "/"
    key: str

    def files(self) -> list[str]:
        return [name for name in self.everything() if "/" not in name]

    def below(self, name: str) -> list[str]:
        return [f"{name}/{inner}" for inner in self.inner(name).everything()]

    def everything(self) -> list[str]:
        """All files at any depth. Raises as `entry`."""
        with _asked(self.url("")):
            chunks = self._obstore().list(self.store, prefix=self.key.rstrip("/") or None)
            keys = sorted(meta["path"] for chunk in chunks for meta in chunk)
        return [key.removeprefix(self.key) for key in keys]

    def inner(self, name: str) -> "RemoteFolder":
        """The folder of this name in it; "" is itself."""
        return RemoteFolder(self.store, self.place, f"{self.key}{name}/") if name else self

    def open(self, name: str) -> BinaryIO:
        return io.BufferedReader(_Reader(self, self.entry(name)), _HEADER)

    def entry(self, name: str) -> Entry:
        """Raises SlideNotFound; SlideUnreadable where the store refuses it or does not answer."""
        with _asked(self.url(name)):
            return Entry.of(self._obstore().head(self.store, self.key + name))

    def read(self, entry: Entry, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file. Raises SlideChanged where it is not the one that was listed any more."""
        if start >= end:
            return b""
        url = self.place + entry.key
        with _asked(url):
            answer = self._obstore().get(self.store, entry.key, options={"range": (start, end)})
            if Entry.of(answer.meta)[1:] != entry[1:]:
                raise SlideChanged(f"{url} changed while it was copied: run the same command again")
            content = bytes(answer.bytes())
        if len(content) != end - start:
            raise SlideUnreadable(
                f"{url} cannot be read: of bytes {start} to {end} the server sent {len(content)}: download the slide "
                f"and give the file"
            )
        return content

    def url(self, name: str) -> str:
        return f"{self.place}{self.key}{name}"

    @staticmethod
    def _obstore() -> Any:
        import obstore

        return obstore


class _Reader(io.RawIOBase):
    """A file of a store that is read in pieces, from any place."""

    def __init__(self, folder: RemoteFolder, entry: Entry) -> None:
        self._folder, self._entry, self._at = folder, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._entry.bytes}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = self._folder.read(self._entry, self._at, min(self._at + len(buffer), self._entry.bytes))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


@dataclass(frozen=True)
class RemoteSlide:
    """A slide of a store, as `SlideFiles`."""

    folder: RemoteFolder
    name: str

    @property
    def place(self) -> str:
        return self.folder.url(self.name)

    def entry(self) -> Entry:
        """Of the slide's own file. Raises as `RemoteFolder.entry`."""
        return self.folder.entry(self.name)

    def origin(self) -> Origin:
        entry = self.entry()
        return Origin(self.place, entry.bytes, entry.mtime_ns, entry.etag)

    def part(self, name: str) -> Part:
        return Part(name, *self.folder.entry(name)[1:])

    def parts(self) -> list[Part]:
        try:
            names = parts(self.name, self.folder)
        except OSError as error:
            raise SlideUnreadable(f"{self.place} cannot be read: {error}") from None
        return [self.part(name) for name in names]

    def pieces(self, part: Part) -> Iterator[bytes]:
        entry = self.folder.entry(part.name)
        if entry[1:] != part[1:]:
            raise SlideChanged(f"{self.folder.url(part.name)} changed while it was copied: run the same command again")
        for start in range(0, entry.bytes, _PIECE):
            yield self.folder.read(entry, start, min(start + _PIECE, entry.bytes))
