"""Run a command, and sample from outside the memory of all its processes and the size of folders.

    python workflows/benchmarks/watch.py --tsv watch.tsv --folder 'out/**/work' -- nightslide run slides --out out

Of each process its PSS is sampled (memory pages that several share are divided among them, so that the sum is what the
command occupies) and its USS (pages that it alone holds); of each folder, the disk blocks of its files.
The last lines are the peaks; the exit status is the command's.
"""

import argparse
import glob
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, TextIO

import psutil


class Usage(NamedTuple):
    """Memory of a process in bytes, now or at its peak, and its CPU seconds."""

    pss: int
    uss: int
    cpu_s: float
    command: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tsv", type=Path, required=True, help="a row a sample: seconds, what, name, bytes")
    parser.add_argument("--folder", action="append", default=[], help="a folder, or a pattern such as 'out/**/work'")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between samples (%(default)s)")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    with given.tsv.open("w", encoding="utf-8") as tsv:
        tsv.write("seconds\twhat\tname\tbytes\n")
        started = time.monotonic()
        child = psutil.Popen(given.command)
        for number in (signal.SIGINT, signal.SIGTERM):  # the command decides how to end
            signal.signal(number, lambda got, _: None if got == signal.SIGINT else child.send_signal(got))
        status, processes, totals = watch(child, tsv, given.folder, given.every)
    print(f"exit status {status} after {time.monotonic() - started:.0f} s; samples in {given.tsv}")
    for pid, peak in processes.items():
        print(f"{pid:>8}  PSS {mb(peak.pss)}  USS {mb(peak.uss)}  CPU {peak.cpu_s:7.1f} s  {peak.command}")
    for name, size in totals.items():
        print(f"    peak {mb(size)}  {name}")
    return status


def watch(
    child: psutil.Popen, tsv: TextIO, folders: list[str], every: float
) -> tuple[int, dict[int, Usage], dict[str, int]]:
    """Sample until the command ends. Returns its exit status and the peaks: of each process, of sums and folders."""
    processes: dict[int, Usage] = {}
    totals: dict[str, int] = {}
    started = time.monotonic()
    while True:
        now = measure(child)
        sizes = {"all processes, PSS": sum(usage.pss for usage in now.values())}
        sizes |= {pattern: folder_bytes(pattern) for pattern in folders}
        seconds = f"{time.monotonic() - started:.1f}"
        for pid, usage in now.items():
            before = processes.get(pid, usage)
            processes[pid] = Usage(max(before.pss, usage.pss), max(before.uss, usage.uss), usage.cpu_s, usage.command)
            tsv.write(f"{seconds}\tpss\t{pid}\t{usage.pss}\n{seconds}\tuss\t{pid}\t{usage.uss}\n")
        for name, size in sizes.items():
            totals[name] = max(size, totals.get(name, 0))
            tsv.write(f"{seconds}\ttotal\t{name}\t{size}\n")
        tsv.flush()
        try:
            return int(child.wait(timeout=every)), processes, totals
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            pass


def measure(child: psutil.Process) -> dict[int, Usage]:
    """The usage of the command and its descendants by process id; a process that is ending is left out."""
    usages = {}
    try:
        family = [child, *child.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        try:
            memory, cpu, command = process.memory_full_info(), process.cpu_times(), process.cmdline()
            # a worker that multiprocessing spawned has no more telling arguments
            usages[process.pid] = Usage(memory.pss, memory.uss, cpu.user + cpu.system, " ".join(command[1:])[:80])
        except psutil.NoSuchProcess:
            continue
    return usages


def folder_bytes(pattern: str) -> int:
    """Bytes on disk of the files in all folders that match, while others write and delete them."""
    total = 0
    for folder in glob.iglob(pattern, recursive=True, include_hidden=True):
        for where, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.lstat(os.path.join(where, name)).st_blocks * 512
                except FileNotFoundError:
                    continue
    return total


def mb(size: int) -> str:
    return f"{size / 1e6:8.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
