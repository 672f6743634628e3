"""Of many processes that take a slide one gets it; leases of dead processes are taken over, of living ones never."""

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.archive import lease
from pipeline.archive.lease import Leases
from pipeline.layout import LEASE

ROOT = Path(__file__).parents[3]

# Takes the folders that it is sent, prints which are its own, and holds them until it is killed or its input ends.
JOB = """
import sys
from pathlib import Path
from pipeline.archive.lease import Leases
print("ready", flush=True)
folders = sys.stdin.readline().split()
with Leases() as leases:
    print(*[int(leases.take(Path(folder))) for folder in folders], flush=True)
    sys.stdin.read()
"""


@contextmanager
def jobs(count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that wait, imports done, for the folders that they shall take."""
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", JOB], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            for _ in range(count)
        ]
        try:
            for job in started:
                assert job.stdout
                assert job.stdout.readline() == "ready\n"
            yield started
        finally:
            for job in started:
                job.kill()


def tell(job: subprocess.Popen[str], folders: list[Path]) -> None:
    assert job.stdin
    job.stdin.write(" ".join(map(str, folders)) + "\n")
    job.stdin.flush()


def taken(job: subprocess.Popen[str]) -> list[bool]:
    assert job.stdout
    return [bool(int(word)) for word in job.stdout.readline().split()]


def file_of(folder: Path) -> Path:
    """The one file of a lease."""
    (file,) = (folder / LEASE).iterdir()
    return file


def make(folder: Path, content: str, age_s: float = 0.0) -> Path:
    """A lease as somebody else may have left it."""
    file = folder / LEASE / "theirs"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    age(file, age_s)
    return file


def age(file: Path, seconds: float) -> None:
    then = file.stat().st_mtime - seconds
    os.utime(file, (then, then))


def elsewhere(pid: int = 1) -> str:
    return json.dumps({"host": "node7", "pid": pid, "started": 1.0, "machine": "another one"})


OUR_PID = "another machine's process with our pid"  # which is known in the test: ids of tests do not change
ENDLESS_PID = elsewhere().replace('"pid": 1', '"pid": Infinity')
LONG_DEAD_S = 180 + 2 * 3600 + 20  # too old even where the clocks of two machines differ by two hours


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "it did not happen within 30 s"
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------------- at most one


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["take", "release", "expire", "damage"]))))
def test_at_most_one_has_a_slide(tmp_path_factory: pytest.TempPathFactory, deeds: list[tuple[int, str]]) -> None:
    """Law: whatever three runs do, at most one has the slide, and no file is left when all have released it."""
    folder = tmp_path_factory.mktemp("slide")
    runs = [Leases() for _ in range(3)]
    holder, expired = None, False
    for who, deed in deeds:
        if deed == "take":
            free = holder in (None, who) or expired
            assert runs[who].take(folder) == free
            holder, expired = (who, False) if free else (holder, expired)
        elif deed == "release":
            runs[who].release(folder)
            holder, expired = (None, False) if holder == who else (holder, expired)
        elif holder == who and deed == "expire":
            age(file_of(folder), LONG_DEAD_S)
            expired = True
        elif holder == who and deed == "damage":
            file_of(folder).write_text("")
            expired = False
        assert (folder / LEASE).exists() == (holder is not None)
    assert [run.ours(folder) for run in runs] == [who == holder for who in range(3)]
    for run in runs:
        run.release(folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a dead lease"])
def test_of_many_threads_one_takes_a_slide(tmp_path: Path, left: str) -> None:
    """Law: of those that take a free or dead lease at once exactly one has it."""
    folders = [tmp_path / str(number) for number in range(30)]
    for folder in folders:
        if left == "an empty folder":
            (folder / LEASE).mkdir(parents=True)
        elif left == "a dead lease":
            make(folder, elsewhere(), age_s=LONG_DEAD_S)
    runs = [Leases() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for folder in folders:
            won = list(pool.map(lambda run, folder=folder: run.take(folder), runs))
            assert sum(won) == 1
            assert [run.ours(folder) for run in runs] == won
            assert [path.name for path in folder.iterdir()] == [LEASE]


def test_of_many_processes_one_takes_a_slide_and_what_the_killed_held_is_free_at_once(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(20)]
    with jobs(5) as (doomed, *others):
        tell(doomed, folders[:10])
        assert taken(doomed) == [True] * 10
        assert Leases().holder(folders[0]).endswith(f", process {doomed.pid}")
        assert not Leases().take(folders[0]), "it lives"
        doomed.kill()
        os.waitid(os.P_PID, doomed.pid, os.WEXITED | os.WNOWAIT)  # dead, though its parent has not asked: a zombie
        for job in others:
            tell(job, folders)
        won = [taken(job) for job in others]
        assert [sum(column) for column in zip(*won, strict=True)] == [1] * 20
        for job in others:
            job.communicate("", timeout=30)
    assert not [path for folder in folders for path in folder.iterdir()], "at the end all is released"


def test_a_take_that_comes_late_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: between the check of a dead lease and its removal, and before the rename, any time may pass."""
    slow, quick, theirs = Leases(), Leases(), make(tmp_path, elsewhere(), age_s=LONG_DEAD_S)
    unlink, rename = Path.unlink, os.rename
    late: list[str] = []

    def unlink_late(path: Path, missing_ok: bool = False) -> None:
        if path == theirs and not late:
            late.append("unlink")
            assert quick.take(tmp_path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_late)
    assert not slow.take(tmp_path)
    assert quick.ours(tmp_path)
    quick.release(tmp_path)

    def rename_late(source: Path, target: Path) -> None:
        if len(late) < 2:
            late.append("rename")
            assert quick.take(tmp_path)
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_late)
    assert not slow.take(tmp_path)
    assert late == ["unlink", "rename"]
    assert quick.ours(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LEASE]


# ------------------------------------------------------------------------------------------- taken, kept, given


def test_a_lease_is_taken_once_and_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    one, other = Leases(), Leases()
    assert one.take(folder)
    assert one.take(folder), "what is ours is ours"
    assert one.file(folder) == file_of(folder), "by which the tasks of a slide know that it is ours"
    assert not other.take(folder), "a token an object, not a process"
    assert other.file(folder) is None
    other.release(folder)
    assert one.ours(folder)
    assert one.holder(folder) == other.holder(folder) != ""
    one.release(folder)
    assert one.holder(folder) == ""
    assert other.take(folder)
    one.release(folder)
    assert other.ours(folder)


def test_a_folder_that_an_indexer_makes_in_a_lease_holds_no_slide(tmp_path: Path) -> None:
    """Such as Synology's @eaDir, while a lease is held and when it is given back."""
    for held in (False, True):
        slide = tmp_path / str(held)
        (slide / LEASE / "@eaDir" / "more").mkdir(parents=True)
        with Leases() as first, Leases() as second:
            assert first.take(slide)
            if held:
                (slide / LEASE / "@eaDir").mkdir()
            assert not second.take(slide)
            assert f"process {os.getpid()}" in first.holder(slide)
            first.release(slide)
            assert second.holder(slide) == ""
            assert not lease.may_be_held(slide)
            assert second.take(slide)


def test_the_end_of_the_context_releases_and_sweeps(tmp_path: Path) -> None:
    with Leases() as leases:
        assert leases.take(tmp_path / "a")
        assert leases.take(tmp_path / "b")
        (tmp_path / "a" / f"{LEASE}-of-a-killed-one").mkdir()
        (tmp_path / "a" / f"{LEASE}-of-a-killed-one" / "token").touch()
        shutil.rmtree(tmp_path / "b")
    assert not list((tmp_path / "a").iterdir())
    assert leases.take(tmp_path / "b")


def test_a_server_that_does_not_answer_once_keeps_no_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that stayed would have to expire, for three minutes."""
    one = Leases()
    assert one.take(tmp_path)
    with monkeypatch.context() as away:
        away.setattr(lease, "_touch", lambda file: False)
        one.release(tmp_path)
    other = Leases()
    assert other.take(tmp_path)

    def gone(folder: Path, pattern: str) -> list[Path]:
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setattr(Path, "glob", gone)
    other.release(tmp_path)
    assert Leases().take(tmp_path)


def test_a_lease_that_could_not_be_given_back_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: what we have left in a folder that could not be written is not taken for another run's lease."""

    def refuse(path: Path, **_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    one = Leases()
    assert one.take(tmp_path)
    with monkeypatch.context() as away:
        away.setattr(Path, "unlink", refuse)
        one.release(tmp_path)
    assert not Leases().take(tmp_path), "it is ours until it expires, as far as others know"
    assert one.holder(tmp_path) == ""
    assert one.take(tmp_path)
    one.release(tmp_path)
    with monkeypatch.context() as away:  # it was taken, and then could not be reached
        away.setattr(lease, "_touch", lambda file: False)
        assert not one.take(tmp_path)
    assert one.holder(tmp_path) == ""
    assert one.take(tmp_path)
    other = Leases()
    other.release(tmp_path)
    assert not other.take(tmp_path)
    one.release(tmp_path)
    assert other.take(tmp_path)
    assert one.holder(tmp_path) == other.holder(tmp_path) != ""


def test_the_heartbeat_continues_when_a_folder_vanishes(tmp_path: Path) -> None:
    with Leases(beat_s=0.01) as leases:
        assert leases.take(tmp_path / "a")
        assert leases.take(tmp_path / "b")
        shutil.rmtree(tmp_path / "a")
        assert not leases.ours(tmp_path / "a")
        file = file_of(tmp_path / "b")
        for _ in range(3):
            os.utime(file, (1, 1))
            wait_for(lambda: file.stat().st_mtime > 1)
        assert not Leases().take(tmp_path / "b")


def test_an_owner_that_was_suspended_too_long_has_lost_its_lease(tmp_path: Path) -> None:
    """A suspended process: its process exists, its heartbeat has stopped."""
    suspended, other = Leases(), Leases(expiry_s=180)
    assert suspended.take(tmp_path)
    age(file_of(tmp_path), LONG_DEAD_S - 30)
    assert not other.take(tmp_path)
    age(file_of(tmp_path), 30)
    assert other.take(tmp_path)
    assert not suspended.ours(tmp_path)
    being_made = tmp_path / f"{LEASE}-of-a-third-one"
    being_made.mkdir()
    suspended.release(tmp_path)
    assert being_made.exists(), "whoever has lost a slide removes nothing there"
    assert other.ours(tmp_path)
    assert not suspended.take(tmp_path)


# ------------------------------------------------------------------------------------------- clocks that differ


class Clock:
    """Our monotonic clock, as a test sets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)


OFFSETS_S = [-3600.0, -600.0, 0.0, 600.0, 3600.0]


@pytest.mark.parametrize("offset_s", OFFSETS_S)
def test_an_owner_whose_heartbeat_goes_on_keeps_its_lease_whatever_its_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset_s: float
) -> None:
    """Law: a file system that stamps with the clock of the machine that writes takes nothing from the living."""
    clock, other, file = Clock(monkeypatch), Leases(), make(tmp_path, elsewhere(), age_s=-offset_s)
    for _ in range(60):
        assert not other.take(tmp_path)
        clock.now_s += 20
        age(file, -20)  # a beat
    assert not other.take(tmp_path)


@pytest.mark.parametrize("offset_s", OFFSETS_S)
def test_an_owner_without_heartbeat_is_dead_whatever_its_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset_s: float
) -> None:
    """Law: nobody waits for ever for a dead owner, even if its last heartbeat lies in the future."""
    clock, other = Clock(monkeypatch), Leases()
    make(tmp_path, elsewhere(), age_s=-offset_s)
    assert not other.take(tmp_path)
    clock.now_s += 170
    assert not other.take(tmp_path)
    clock.now_s += 20
    assert other.take(tmp_path)


def test_a_lease_is_watched_from_its_last_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, other, file = Clock(monkeypatch), Leases(), make(tmp_path, elsewhere())
    assert not other.take(tmp_path)
    clock.now_s += 170
    age(file, -1)
    assert not other.take(tmp_path)
    clock.now_s += 170
    assert not other.take(tmp_path)
    clock.now_s += 20
    assert other.take(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
@pytest.mark.parametrize("leads_to", ["nowhere", "itself"])
def test_a_link_in_a_lease_is_no_owner_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leads_to: str) -> None:
    """It was waited for, or its slide failed, until somebody removed it."""
    clock, other = Clock(monkeypatch), Leases()
    (tmp_path / LEASE).mkdir()
    (tmp_path / LEASE / "itself").symlink_to(leads_to)
    assert not other.take(tmp_path)
    assert other.holder(tmp_path) == "an unknown process"
    clock.now_s += 190
    assert other.take(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a machine is told by its network address")
@pytest.mark.parametrize(("where", "name"), [(platform, "node"), (os, "readlink"), (os, "getuid")])
def test_another_host_container_or_user_is_another_machine(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str
) -> None:
    """Copies of a virtual machine may share the id of a boot, and a container has pids of its own: these mean different
    processes. Those of another user may be hidden.
    """
    me = lease._me()
    assert lease._is_gone(me._replace(started=-1.0))
    monkeypatch.setattr(where, name, lambda *_: "another")
    assert not lease._is_gone(me._replace(started=-1.0))


# ----------------------------------------------------------------------------------------------- who is dead


@pytest.mark.parametrize(
    "content", [elsewhere(), OUR_PID, "", "{", "[]", "[" * 9999, '{"host": "x"}', ENDLESS_PID, "\0" * 99]
)
def test_an_owner_that_cannot_be_asked_lives_until_it_expires(tmp_path: Path, content: str) -> None:
    """Another machine's, or a file that tells nothing: whatever its pid means here."""
    leases, file = Leases(), make(tmp_path, elsewhere(pid=os.getpid()) if content is OUR_PID else content)
    assert not leases.take(tmp_path)
    assert leases.holder(tmp_path)
    age(file, LONG_DEAD_S - 30)
    assert not leases.take(tmp_path)
    age(file, 30)
    assert leases.take(tmp_path)


def test_the_clock_is_the_file_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: what this machine holds for the time changes nothing."""
    make(tmp_path, elsewhere())
    monkeypatch.setattr(time, "time", lambda: 4e9)
    monkeypatch.setattr(time, "time_ns", lambda: int(4e18))
    assert not Leases().take(tmp_path)


def test_a_pid_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    me = lease._me()
    make(tmp_path / "a", json.dumps(me._asdict()))
    assert not Leases().take(tmp_path / "a")
    make(tmp_path / "b", json.dumps(me._replace(started=me.started - 60)._asdict()))
    assert Leases().take(tmp_path / "b")


def test_an_owner_lives_whatever_becomes_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set by an hour, it moves the time of the boot and that at which a process started, both since 1970."""
    assert Leases().take(tmp_path)
    boot, started = psutil.boot_time(), psutil.Process().create_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: boot + 3600)
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: started + 3600)
    assert not Leases().take(tmp_path)


def test_an_owner_that_may_not_be_looked_at_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does one whose pid is none, as a damaged file may have it."""
    me = lease._me()
    make(tmp_path / "none", json.dumps(me._replace(pid=-1)._asdict()))
    assert not Leases().take(tmp_path / "none")
    make(tmp_path / "hidden", json.dumps(me._asdict()))

    def hidden(_: psutil.Process) -> str:
        raise psutil.AccessDenied

    with monkeypatch.context() as patch:
        patch.setattr(psutil.Process, "status", hidden)
        assert not Leases().take(tmp_path / "hidden")


def test_a_lease_that_is_given_back_while_it_is_read_has_no_known_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing of the folder and the reading of the file; the slide is free at the next try."""
    owner, read = Leases(), Path.read_text
    assert owner.take(tmp_path)

    def late(path: Path, **options: str) -> str:
        owner.release(tmp_path)
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", late)
    assert Leases().holder(tmp_path) == "an unknown process"
    monkeypatch.undo()
    assert owner.take(tmp_path)
    monkeypatch.setattr(Path, "read_text", late)
    other = Leases()
    assert not other.take(tmp_path)
    assert other.take(tmp_path)


def test_an_owner_whose_process_is_gone_is_dead_at_once(tmp_path: Path) -> None:
    """Gone altogether: its parent has asked for its status, as a shell does."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    make(tmp_path, json.dumps(lease._me()._replace(pid=ended.pid)._asdict()))
    assert Leases().take(tmp_path)


def test_without_a_pid_namespace_no_owner_is_known_to_be_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path, encoding: str) -> str:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "read_text", unreadable)
    monkeypatch.setattr(sys, "platform", "linux")
    assert not lease._is_gone(lease._me()._replace(started=-1.0))


def test_a_file_in_the_place_of_a_lease_is_named(tmp_path: Path) -> None:
    """The slide's folder was called no folder."""
    (tmp_path / LEASE).touch()
    with pytest.raises(NotADirectoryError) as refused:
        Leases().take(tmp_path)
    assert refused.value.filename == str(tmp_path / LEASE)
    assert not list(tmp_path.glob(f"{LEASE}-*"))


def test_what_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is an error, not another run that was faster; nothing stays."""

    def full(path: Path, text: str, encoding: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        Leases().take(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dead", [False, True])
def test_a_free_slide_is_taken_where_nothing_is_renamed_over_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: bool
) -> None:
    """Not over an empty one either, on some network file systems; a killed process may leave one."""
    if dead:
        make(tmp_path, elsewhere(), age_s=LONG_DEAD_S)
    else:
        (tmp_path / LEASE).mkdir()
    rename = os.rename

    def rename_to_nothing(source: Path, target: Path) -> None:
        if target.exists():
            raise FileExistsError(errno.EEXIST, "File exists")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_to_nothing)
    leases = Leases()
    assert leases.take(tmp_path)
    assert leases.ours(tmp_path)


def test_who_has_a_slide_is_not_known_where_a_file_server_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for a message, which ends no run."""
    with Leases() as ours:
        ours.take(tmp_path)
        assert str(os.getpid()) in ours.holder(tmp_path)

        def stale(_: Path) -> list[Path]:
            raise OSError(errno.ESTALE, "Stale file handle")

        monkeypatch.setattr(lease, "_files", stale)
        assert ours.holder(tmp_path) == ""
        monkeypatch.undo()
