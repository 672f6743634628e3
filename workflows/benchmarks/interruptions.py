"""Does the same command end in the same bytes after a run was killed, its files damaged, or its power cut? Trials.

    python workflows/benchmarks/interruptions.py --moments 200 --power-cuts 13 --seed 0

Every trial starts a run on a painted slide, with the oracle of tests/ in the detector's place, and kills it at a random
moment, from its start to after its end. Then one file of those in the output folder, chosen at random, is cut, emptied,
zeroed or has a bit flipped. Then the same command runs again. It must give the bytes of an undisturbed run, or name the
result that is damaged in one line, or `nightslide verify` must name it where its size is unchanged or it is a picture;
in both cases --overwrite must give those bytes.

With --power-cuts (as root, on Linux) the output folder lies on an ext4 file system in a file, which is copied at a
random moment: the copy is a disk after a power cut. It is mounted, and the same command runs there. The run is
suspended for the copy, which takes a while: else its beginning would be of an earlier moment than its end, which no
disk's is. (The kernel goes on to write what the run did not wait for.)

Exit status 1 if any trial failed; its folder stays.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import oracle  # noqa: E402
from pipeline.archive import run as archive_run  # noqa: E402
from pipeline.archive.lease import Leases  # noqa: E402
from pipeline.archive.verify import verify_results  # noqa: E402
from pipeline.config import Execution  # noqa: E402
from pipeline.errors import RunError  # noqa: E402
from pipeline.layout import RunFolder  # noqa: E402

PATCH_S = 0.01  # of the oracle
EXPIRY_S = 5.0  # in place of 180 s: after a power cut a lease may not name its owner
PATIENCE_S = 120

# Forked, so that a trial need not import anything. This process starts no threads and computes nothing.
FORK = multiprocessing.get_context("fork")
with contextlib.suppress(ImportError):
    importlib.import_module("pandas")  # pyarrow would import it in every trial, where it is installed


def segment(slide: Path, out: Path, overwrite: bool) -> None:
    """A run as a process of its own; exit status 0 if the slide is done. Else the cause is in OUT.log."""
    os.environ[oracle.SECONDS] = str(PATCH_S)
    how = dataclasses.replace(Execution(cluster=False, workers=2), overwrite=overwrite)
    vars(archive_run)["Leases"] = functools.partial(Leases, EXPIRY_S / 10, EXPIRY_S)
    settings, silent = oracle.chosen(tile=96, block=1), lambda line: None
    try:
        (record,) = archive_run.run([slide], out, settings, how, mpp=0.25, say=silent, detect=oracle.detect)
        status, cause = (0, "") if record.done else (1, record.cause)
    except RunError as error:
        status, cause = 2, str(error)
    except BaseException:
        status, cause = 3, traceback.format_exc()
    log_of(out).write_text(cause, encoding="utf-8")
    os._exit(status)


def log_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def start(slide: Path, out: Path, *, overwrite: bool = False) -> BaseProcess:
    process = FORK.Process(target=segment, args=(slide, out, overwrite))
    process.start()
    return process


def finish(process: BaseProcess) -> int | None:
    """The exit status; None for a process that does not end and is killed."""
    process.join(PATIENCE_S)
    status = process.exitcode
    kill(process)
    return status


def suspend(process: BaseProcess) -> None:
    """Stop every thread, once the kernel has done what it was asked for; nothing for a process that has ended."""
    assert process.pid is not None
    tasks, since = Path(f"/proc/{process.pid}/task"), time.monotonic()
    with contextlib.suppress(OSError):  # it has ended
        os.kill(process.pid, signal.SIGSTOP)
        while any(_state(task) not in "TtZX" for task in tasks.iterdir()) and time.monotonic() - since < PATIENCE_S:
            time.sleep(0.001)


def _state(task: Path) -> str:
    """A letter, as proc(5) has it; X for a thread that has ended."""
    try:
        return (task / "stat").read_text(encoding="utf-8").rpartition(") ")[2][0]
    except OSError:
        return "X"


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


def damage(out: Path, rng: random.Random) -> str:
    """Damage a file in the output folder. Returns which, and how; empty where there is none."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.stat().st_size)
    if not files:
        return ""
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    kind = rng.choice(("cut", "emptied", "zeroed", "flipped"))
    if kind == "flipped":
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
    elif kind == "zeroed":
        content = bytearray(len(content))
    else:
        del content[rng.randrange(len(content)) if kind == "cut" else 0 :]
    file.write_bytes(content)
    return f"{file.relative_to(out)} {kind}"


def problem(slide: Path, out: Path, results: dict[str, bytes], damaged: str = "") -> str:
    """Run the command in a folder as a trial left it. Returns what is wrong; empty where it ends as it must."""
    status = finish(start(slide, out))
    cause = log_of(out).read_text(encoding="utf-8") if status is not None else ""
    name = Path(damaged.split(" ")[0]).name
    if name and "/work/" not in damaged and _is_named(name, status, cause, out):
        status = finish(start(slide, out, overwrite=True))
    if status != 0:
        return f"exit status {status}: {cause.strip()}"
    folder = RunFolder(out).slide(slide.stem).path
    wrong = [file for file, content in results.items() if _content(folder / file) != content]
    return f"{', '.join(wrong)} differ" if wrong else ""


def _is_named(name: str, status: int | None, cause: str, out: Path) -> bool:
    """Whether the command, or else `nightslide verify`, said in one line which result is damaged."""
    if status == 0:
        return any(said.startswith(name) for _, problems in verify_results(out) for said in problems)
    return name in cause and "\n" not in cause


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def killed_and_damaged(slide: Path, out: Path, longest_s: float, rng: random.Random) -> str:
    """Kill a run at a random moment, and damage a file. Returns which, and how."""
    process = start(slide, out)
    time.sleep(rng.uniform(0, longest_s))
    kill(process)
    return damage(out, rng)


@contextlib.contextmanager
def mounted(image: Path, at: Path) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    # metadata reach the disk within a second, and their files' content, unless it is synced, in half a minute
    subprocess.run(["mount", "-o", "loop,commit=1", image, at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


def without_power(slide: Path, image: Path, longest_s: float, rng: random.Random) -> Path:
    """Cut the power of a run on a file system of its own. Returns the disk's image after that."""
    with image.open("wb") as file:
        file.truncate(256 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    after = image.with_name(f"{image.name}.cut")
    with mounted(image, image.with_name("live")) as disk:
        process = start(slide, disk / "out")
        time.sleep(rng.uniform(0, longest_s))
        suspend(process)
        shutil.copyfile(image, after)
        kill(process)
    return after


def trials(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """What is wrong after each trial; the folder of one that failed stays."""
    slide, rng = folder / "discs.png", random.Random(arguments.seed)
    oracle.paint(slide, arguments.seed)
    started = time.monotonic()
    if finish(start(slide, folder / "undisturbed")) != 0:
        raise RuntimeError(f"the undisturbed run failed: {log_of(folder / 'undisturbed').read_text()}")
    longest_s = 1.2 * (time.monotonic() - started)
    results = oracle.files(folder / "undisturbed" / slide.stem)
    for number in range(arguments.moments):
        out = folder / f"moment-{number}"
        damaged = killed_and_damaged(slide, out, longest_s, rng)
        wrong = problem(slide, out, results, damaged)
        if not wrong:
            shutil.rmtree(out, ignore_errors=True)
        yield f"{out}, {damaged or 'nothing damaged'}: {wrong}" if wrong else ""
    for number in range(arguments.power_cuts):
        disk = without_power(slide, folder / f"disk-{number}", longest_s, rng)
        with mounted(disk, folder / "after") as place:
            wrong = problem(slide, place / "out", results)
        yield f"{disk}: {wrong}" if wrong else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--power-cuts", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, started = Path(tempfile.mkdtemp(prefix="interruptions-")), time.monotonic()
    total, bad = arguments.moments + arguments.power_cuts, 0
    for number, wrong in enumerate(trials(arguments, folder), 1):
        bad += bool(wrong)
        if wrong:
            print(wrong, flush=True)
        if number % 10 == 0:
            print(f"{number} trials, {bad} failed, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{total - bad} of {total} trials ended in the bytes of an undisturbed run, or named the damaged result")
    if not bad:
        shutil.rmtree(folder)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
