"""Which run processes which slide, where several runs share one output folder and nothing else.

A lease is the folder `.lease` of a slide, with one file in it: its name is a token that is never used again, it says
who the owner is, and the owner sets its mtime again and again, which is the heartbeat. A folder `.lease` that is empty,
or not there, is free. The protocol:

take     make a folder of our own beside, `.lease-TOKEN`, with our file in it; unlink the files of dead owners in
         `.lease`; rename our folder to `.lease`, which a file system does, in one step, only where there is no such
         folder or an empty one. Then check that our file is in it: a server's answer may get lost, the file does not.
beat     touch our file.
release  unlink our file, then the folder, which is only removed when it is empty. A file that cannot be removed now is
         for others a lease that expires, and for us none.

Why it holds: whatever removes or touches a lease names its token, so a process that was suspended between its check
and its action, for however long, cannot remove the lease that another process has made meanwhile; and of many that
rename at once one finds the folder empty. NFS caches do not matter: the server decides every step. A process that
dies leaves a lease that expires, an empty folder, or a `.lease-TOKEN`, which the next release removes.

An owner counts as dead, and its lease may be taken, in any of three cases:
- it was a process of this user on this machine, in this boot and pid namespace, and has ended: at once;
- the mtime of its file stayed the same for `expiry_s` between our checks, by our own monotonic clock;
- its file is older than ours, just made, by `expiry_s` and two hours more: at once.
Some file systems stamp files with the clock of the server, others with that of the machine that writes. Clocks may be
wrong by an hour each: so a difference of mtimes of less than two hours, into the past or the future, decides nothing.
A file that a power cut has emptied or damaged says nothing of its owner, who may be alive: the server lost power, not
the machine that works. Its age decides no sooner than that of others, as the owner's clock may be an hour behind; and
a whole file from before a restart of this machine is not taken at once either, as another may have its name.
An owner that was suspended for longer than `expiry_s` loses its lease, and may ask `ours`. What it writes meanwhile
is the same bytes.
"""

import contextlib
import errno
import json
import os
import platform
import shutil
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import NamedTuple, Self

import psutil

from pipeline.errors import LeaseLost
from pipeline.layout import LEASE

# errors where another process was faster: its folder is not empty, or its release has removed ours
_LOST_RACE = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ESTALE}

_CLOCKS_DIFFER_NS = 2 * 3600 * 10**9  # at most, between two machines: each may be wrong by an hour


class Owner(NamedTuple):
    """Identifies a process for others."""

    host: str
    pid: int
    started: float  # seconds, see `_start_time`
    machine: str  # host name, boot and pid namespace, in which its pid means something


class Leases:
    """The leases of one run, kept alive by a thread while the context lasts, and released at its end.

    Law: of all `Leases`, in all processes, that take a folder, at most one has it.
    """

    def __init__(self, beat_s: float = 20.0, expiry_s: float = 180.0) -> None:
        """beat_s: between heartbeats; expiry_s: the same for all runs, and many beats, as a server may be slow."""
        self._beat_s, self._expiry_s = beat_s, expiry_s
        self._held: dict[Path, Path] = {}  # the folder of a slide -> our file
        self._left: set[Path] = set()  # files of ours that are no lease any more, and could not be removed
        self._watched: dict[Path, tuple[int, float]] = {}  # another's file -> mtime, and since when (our clock)
        self._lock = threading.Lock()  # of `_held`; never held while the file system is asked
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._heart.join()
        self.release_all()

    def release_all(self) -> None:
        """Give every folder back. Tasks of this run, wherever they are, then stop: they ask for their lease."""
        with self._lock:
            folders = list(self._held)
        for folder in folders:
            self.release(folder)

    def take(self, folder: Path) -> bool:
        """Whether a slide is ours now; its folder is made. Raises OSError where nothing can be written."""
        if self.ours(folder):
            return True
        folder.mkdir(parents=True, exist_ok=True)
        lease, token = folder / LEASE, uuid.uuid4().hex
        staged = folder / f"{LEASE}-{token}"
        try:
            now_ns = _stage(staged, token)  # before the others are read: their age is underestimated, if anything
            if not self._clear(lease, now_ns):
                return False
            os.rename(staged, lease)
        except OSError as error:
            if error.errno not in _LOST_RACE:
                if staged.name in str(error.filename or staged):
                    error.filename = str(folder)  # the name of ours says nothing to anybody
                raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        if not _touch(lease / token):
            self._left.add(lease / token)  # it may be there, only out of reach now
            return False
        with self._lock:
            self._held[folder] = lease / token
        return True

    def _clear(self, lease: Path, now_ns: int) -> bool:
        """Remove what dead owners have left; False where one may be alive. now_ns: mtime of a file just made."""
        for file in _files(lease):
            # the second makes NFS fetch its mtime again
            if file not in self._left and not _is_dead(file) and not self._is_expired(file, now_ns):
                return False
            file.unlink(missing_ok=True)
            self._watched.pop(file, None)
            self._left.discard(file)
        with contextlib.suppress(OSError):  # not there, or taken meanwhile
            for folder in lease.iterdir():  # of a file server that indexes, as @eaDir; a file is of another's lease
                shutil.rmtree(folder, ignore_errors=True)
            lease.rmdir()  # some file systems do not rename over even an empty folder
        return True

    def _is_expired(self, file: Path, now_ns: int) -> bool:
        """Whether a file is too old whatever the clocks say, or did not change for `expiry_s` between our looks."""
        mtime_ns, now_s = file.lstat().st_mtime_ns, time.monotonic()  # a link that leads nowhere expires, too
        if now_ns - mtime_ns > self._expiry_s * 1e9 + _CLOCKS_DIFFER_NS:
            return True
        seen_ns, since_s = self._watched.get(file, (None, now_s))
        if seen_ns != mtime_ns:
            self._watched[file] = mtime_ns, now_s
            return False
        return now_s - since_s >= self._expiry_s

    def ours(self, folder: Path) -> bool:
        """Whether we took this folder and no other run has taken it over since; this is a heartbeat, too."""
        with self._lock:
            file = self._held.get(folder)
        return file is not None and _touch(file)

    def check(self, folder: Path) -> None:
        """Called before anything is committed. Raises LeaseLost where the folder is not `ours`."""
        if not self.ours(folder):
            raise LeaseLost(f"{folder.name}: another process has taken this slide over")

    def file(self, folder: Path) -> Path | None:
        """The file that proves that this folder is ours, as long as it exists; None where we have not taken it."""
        with self._lock:
            return self._held.get(folder)

    def release(self, folder: Path) -> None:
        """Give a folder back, if it is still ours. What cannot be removed now expires later."""
        with self._lock:
            file = self._held.pop(folder, None)
        if file is None:
            return
        with contextlib.suppress(OSError):
            # of killed processes; one that is just being made fails, as the slide was ours
            for left in folder.glob(f"{LEASE}-*") if _touch(file) else ():
                shutil.rmtree(left, ignore_errors=True)
        self._left.add(file)
        with contextlib.suppress(OSError):  # what could not be touched a moment ago may be there all the same
            file.unlink(missing_ok=True)
            self._left.discard(file)
            file.parent.rmdir()

    def holder(self, folder: Path) -> str:
        """Who has this folder, for a message; "" if nobody has, or a file server does not say."""
        with contextlib.suppress(OSError):
            for file in _files(folder / LEASE):
                if file in self._left:
                    continue
                owner = _read(file)
                return f"{owner.host}, process {owner.pid}" if owner else "an unknown process"
        return ""

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            with self._lock:
                files = list(self._held.values())
            for file in files:
                # one that is lost stays lost; one whose file system is away for a while is ours when it is back
                _touch(file)


def may_be_held(folder: Path) -> bool:
    """Whether a process has a lease on this folder and is not known to have ended."""
    return not all(map(_is_dead, _files(folder / LEASE)))


def has_ended(folder: Path) -> bool:
    """Whether a process has a lease on this folder, and is known to have ended."""
    owners = _files(folder / LEASE)
    return bool(owners) and all(map(_is_dead, owners))


def _stage(staged: Path, token: str) -> int:
    """Make the folder that may become the lease. Returns the time, by the clock of the file server, in ns."""
    staged.mkdir()
    (staged / token).write_text(json.dumps(_me()._asdict()), encoding="utf-8")
    return (staged / token).stat().st_mtime_ns


def _files(lease: Path) -> list[Path]:
    """The files in a lease's folder: one, or none."""
    try:
        with os.scandir(lease) as entries:
            return [Path(entry.path) for entry in entries if not entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _touch(file: Path) -> bool:
    """Set mtime to now, by the clock of the file server; False where the file is not, or cannot be reached."""
    try:
        os.utime(file)  # without a time: NFS leaves it to the server
    except OSError:
        return False
    return True


# -------------------------------------------------------------------------------------------------- owners


def _me() -> Owner:
    return Owner(platform.node(), os.getpid(), _start_time(psutil.Process()), _machine())


def _read(file: Path) -> Owner | None:
    """Whose lease this is; None where the file is damaged, or has just been removed."""
    try:
        owner = Owner(**json.loads(file.read_text(encoding="utf-8")))
        return Owner(str(owner.host), int(owner.pid), float(owner.started), str(owner.machine))
    except (OSError, ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        return None  # a damaged file may hold anything, of any size


def _is_dead(file: Path) -> bool:
    """Whether a lease is of a process that is known to have ended."""
    owner = _read(file)
    return owner is not None and _is_gone(owner)


def _is_gone(owner: Owner) -> bool:
    """Whether a process is known to have ended; False where that cannot be known on this machine."""
    if owner.machine != _machine():
        return False
    try:
        process = psutil.Process(owner.pid)
        # a pid is used again, though not within two seconds; a zombie has ended
        return process.status() == psutil.STATUS_ZOMBIE or abs(_start_time(process) - owner.started) > 2
    except psutil.NoSuchProcess:
        return True
    except (psutil.AccessDenied, ValueError):
        return False


def _start_time(process: psutil.Process) -> float:
    """When a process started, seconds: on Linux since boot, as the clock may be set, else since 1970."""
    return float(process.create_time()) - (psutil.boot_time() if sys.platform == "linux" else 0.0)


def _machine() -> str:
    """Equal in two processes only if each sees the other under its pid.

    The host's name belongs to it, as copies of a virtual machine may share the rest; and the user, as a machine may
    hide the processes of others.
    """
    host = platform.node()
    if sys.platform != "linux":
        return f"{host} {platform.system()} {uuid.getnode():x}"  # without a network address it is random, so unique
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{host} {boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
    except OSError:  # a kernel that does not tell
        return uuid.uuid4().hex
