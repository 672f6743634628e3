"""Do several processes that fight over one slide still give the bytes of an undisturbed run? Randomised trials.

    python workflows/benchmarks/shared_slide.py --trials 1000 --seed 0

In every trial two to four processes do the same painted slide in the same output folder, with the oracle of tests/ in
the detector's place. Meanwhile they are suspended for longer than their lease lasts, their lease is removed, and its
heartbeat is moved by up to an hour into the past or the future. Every process must exit with 0, all results must have
the bytes of a run on its own, and nothing else may be left. Exit status 1 if any trial differs; its folder stays.
"""

import argparse
import contextlib
import functools
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import oracle  # noqa: E402
from pipeline import files  # noqa: E402
from pipeline.archive import all_slides  # noqa: E402
from pipeline.archive import run as archive_run  # noqa: E402
from pipeline.archive.lease import Leases  # noqa: E402
from pipeline.config import Execution  # noqa: E402
from pipeline.layout import LEASE, RESULTS  # noqa: E402

BEAT_S, EXPIRY_S, POLL_S = 0.03, 0.25, 0.02  # in place of 20 s, 180 s and 5 s
DISTURBED_S = 1.5  # of a trial: then the processes are left alone, and must end
PATIENCE_S = 120  # until a trial has failed

# Forked, so that a trial need not import anything. This process starts no threads and computes nothing.
FORK = multiprocessing.get_context("fork")
for module in ("pipeline.segment.stages", "torch", "scipy.ndimage", "pandas"):  # what a run imports when it needs it
    with contextlib.suppress(ImportError):  # pandas, which pyarrow asks for, is not installed everywhere
        importlib.import_module(module)


def segment(slide: Path, out: Path, threads: int, patch_s: float) -> None:
    """A run as a process of its own; exit status 0 if the slide is done. The cause of a failure is in OUT.<pid>.log."""
    os.environ[oracle.SECONDS] = str(patch_s)
    files._sync = lambda path: None  # no power is cut here
    all_slides._POLL_S = POLL_S
    vars(archive_run)["Leases"] = functools.partial(Leases, BEAT_S, EXPIRY_S)
    log = out.with_name(f"{out.name}.{os.getpid()}.log")
    how = Execution(cluster=False, workers=threads)
    lines: list[str] = []
    try:
        (record,) = archive_run.run(
            [slide], out, oracle.chosen(block=1), how, mpp=0.25, say=lines.append, detect=oracle.detect
        )
        status = int(not record.done)
    except BaseException:
        lines.append(traceback.format_exc())
        status = 3
    if status:
        log.write_text("\n".join(lines), encoding="utf-8")
    os._exit(status)


def start(slide: Path, out: Path, rng: random.Random) -> BaseProcess:
    process = FORK.Process(target=segment, args=(slide, out, rng.choice((1, 3)), rng.choice((0.0, 0.005, 0.02))))
    process.start()
    return process


def expected(slide: Path, out: Path) -> dict[str, bytes]:
    """The results of an undisturbed run."""
    alone = start(slide, out, random.Random(0))
    alone.join()
    if alone.exitcode:
        raise RuntimeError(f"the undisturbed run ended with {alone.exitcode}: {list(out.parent.glob('*.log'))}")
    return oracle.files(out / slide.stem)


def trial(slide: Path, out: Path, rng: random.Random) -> list[int | None]:
    """One trial. Returns the exit status of every process; None for one that does not end."""
    processes = [start(slide, out, rng) for _ in range(rng.randint(2, 4))]
    started = time.monotonic()
    try:
        while any(p.is_alive() for p in processes) and time.monotonic() < started + DISTURBED_S:
            time.sleep(rng.uniform(0, 0.06))
            disturb(rng.choice(processes), out / slide.stem / LEASE, rng)
        for process in processes:
            process.join(max(0.0, started + PATIENCE_S - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def disturb(process: BaseProcess, lease: Path, rng: random.Random) -> None:
    """Suspend a process, perhaps for longer than its lease lasts; or steal a lease; or move its heartbeat."""
    kind = rng.choice(("suspend", "suspend", "steal", "clock", "steal while suspended"))
    with suspended(process) if "suspend" in kind else contextlib.nullcontext():
        if "steal" in kind:
            shutil.rmtree(lease, ignore_errors=True)
        elif kind == "clock":
            move_heartbeat(lease, rng.uniform(-3600, 3600))
        if "suspend" in kind:
            time.sleep(rng.choice((0.02, 0.1, EXPIRY_S + 0.15)))


@contextlib.contextmanager
def suspended(process: BaseProcess) -> Iterator[None]:
    assert process.pid is not None
    if not process.is_alive():
        yield
        return
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def move_heartbeat(lease: Path, seconds: float) -> None:
    with contextlib.suppress(FileNotFoundError):
        for file in lease.iterdir():
            then = file.stat().st_mtime + seconds
            os.utime(file, (then, then))


def differences(out: Path, name: str, statuses: Sequence[int | None], results: dict[str, bytes]) -> list[str]:
    """What is wrong after a trial, a line each; empty where all is as in an undisturbed run."""
    folder, wrong = out / name, []
    if any(statuses):
        wrong.append(f"exit statuses {statuses}")
    if None in statuses:
        wrong.append(f"a process did not end within {PATIENCE_S} s")
    for file, content in results.items():
        path = folder / file
        if not path.exists() or path.read_bytes() != content:
            wrong.append(f"{file} differs")
    left = {path.name for path in folder.iterdir()} - {*RESULTS, *results, "slide.json"} if folder.exists() else ()
    return [*wrong, *(f"{path} is left" for path in sorted(left))]


def trials(count: int, seed: int, folder: Path) -> Iterator[list[str]]:
    """What is wrong after each trial; the folder of one that differs stays."""
    slide = folder / "discs.png"
    oracle.paint(slide, seed)
    results = expected(slide, folder / "undisturbed")
    for number in range(count):
        out = folder / f"trial-{number}"
        statuses = trial(slide, out, random.Random(f"{seed} {number}"))
        wrong = differences(out, slide.stem, statuses, results)
        if not wrong:
            shutil.rmtree(out)
        yield wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, started, bad = Path(tempfile.mkdtemp(prefix="shared-slide-")), time.monotonic(), 0
    for number, wrong in enumerate(trials(arguments.trials, arguments.seed, folder), 1):
        bad += bool(wrong)
        if wrong:
            print(f"trial {number - 1}: {'; '.join(wrong)}: see {folder}/trial-{number - 1}", flush=True)
        if number % 10 == 0:
            print(f"{number} trials, {bad} differ, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{arguments.trials - bad} of {arguments.trials} trials gave the bytes of an undisturbed run")
    if not bad:
        shutil.rmtree(folder)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
