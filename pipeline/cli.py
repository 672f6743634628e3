"""The command `nightslide`: its flags are the fields of pipeline.config's dataclasses, never written again."""

import contextlib
import math
import os
import re
import signal
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module, metadata
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from cyclopts import (
    App,
    CycloptsError,
    Group,
    Parameter,
    Token,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
    convert,
)
from cyclopts.config import Dict

from pipeline.config import (
    COMMON,
    EXECUTION,
    EXPORT,
    REGIONS,
    Execution,
    Export,
    Regions,
    Settings,
    check,
    read_toml,
    require,
)
from pipeline.text import counted, counted_nuclei, duration, printable, shell_command
from slides.errors import NightslideError

if TYPE_CHECKING:
    from pipeline.archive.estimate import SlideEstimate

T = TypeVar("T")

DEBUGGING = Group("Debugging", sort_key=99)
SLIDES, RESULTS, WEIGHTS, MACHINE = (  # of commands, in the order in which they are needed
    Group(name, sort_key=at)  # below 0: before the options
    for at, name in enumerate(["Slides", "Results of a run", "Your own weights", "This machine"], -4)
)
_NAME_CHARS = 48  # of a slide's name in the table of `plan`: a longer one is shortened in its middle


def _exactly(hint: Any, tokens: Sequence[Token]) -> Any:
    """Convert as cyclopts does, but refuse 2.5 where a whole number is needed, which cyclopts rounds, and "" as a path.

    That would be the current folder, as where a script has no value in a variable.
    """
    for token in tokens if Path in (hint, *typing.get_args(hint)) else ():
        named = (token.keyword or "folder").lstrip("-")
        require(token.value != "", f"{named}='': need a path; `.` is the current folder")
    whole = hint is int or (
        typing.get_origin(hint) is Literal and all(isinstance(value, int) for value in typing.get_args(hint))
    )
    for token in tokens if whole else ():
        named = f"{(token.keyword or '').lstrip('-')}={token.value}"
        require(re.fullmatch(r"[+-]?\d+", token.value.strip()) is not None, f"{named}: need a whole number")
    return convert(hint, tokens)


Inputs = Annotated[list[str], Parameter(negative="", consume_multiple=True)]
Out = Annotated[Path, Parameter(group=COMMON)]
Mpp = Annotated[float | None, Parameter(group=COMMON)]
MovedSlides = Annotated[
    Path | None, Parameter(group=COMMON, help="Folder that is searched for slides that have moved since the run.")
]
AllSettings = Annotated[Settings, Parameter(name="*")]

app = App(
    name="nightslide",
    help="Segment every nucleus in H&E whole-slide images, and export the result to QuPath.",
    help_format="plaintext",
    default_parameter=Parameter(converter=_exactly),
    suppress_keyboard_interrupt=False,
    version=lambda: metadata.version("nightslide"),
)
app.meta.suppress_keyboard_interrupt = False
for _flag in ("--help", "--version"):
    app[_flag].group = COMMON
_training: Any = import_module("training.cli")  # by its name, as imports point down; it loads nothing heavy
for _command in (_training.train, _training.evaluate, _training.fit_stain, _training.convert):
    app.command(_command, group=WEIGHTS)


_RESUMED = frozenset(["run", "train", "fit-stain"])  # commands
_CONFIGURED = frozenset(["run", "plan", "demo", "export", "measure", "evaluate"])  # by --config


def main(tokens: Sequence[str] | None = None) -> None:
    """Entry point. Exit status: 0 all done, 1 some slides failed, 2 wrong usage, 130 interrupted."""
    from pipeline.errors import ClusterLost, ExportFailed, WorkersDied

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as by `>&-`
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to stop
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # batch systems send SIGTERM before they kill, a terminal that is closed sends SIGHUP: both are treated like Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # `nohup` ignores it
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        status = app.meta(
            sys.argv[1:] if tokens is None else tokens,
            result_action="return_value",
            exit_on_error=False,
            print_error=False,
        )
        sys.exit(status)
    except KeyboardInterrupt:
        given = sys.argv[1:] if tokens is None else tokens
        left = "; the same command continues where it stopped" if _RESUMED.intersection(given) else ""
        with contextlib.suppress(OSError):  # a terminal that is gone
            print(f"interrupted{left}", file=sys.stderr)
        sys.exit(130)
    except UnknownCommandError as error:  # its own list ends after eight commands
        said, _, _ = str(error).partition(" Available commands:")
        print(f"nightslide: {printable(said)} `nightslide --help` lists the commands.", file=sys.stderr)
        sys.exit(2)
    except UnknownOptionError as error:  # its own guess compares whole names, not --tile and tile
        said, _, _ = str(error).partition(" Did you mean ")
        print(f"nightslide: {printable(said)}{_meant(error)}", file=sys.stderr)
        sys.exit(2)
    except UnusedCliTokensError as error:
        unused = error.unused_tokens or []
        remedy = "a flag takes one value and is given again for each further one; files and folders stand together"
        said = f"{' '.join(unused)}: {counted(len(unused), 'argument')} too many; {remedy}"
        print(f"nightslide: {printable(said)}", file=sys.stderr)
        sys.exit(2)
    except (NightslideError, CycloptsError) as error:
        print(f"nightslide: {printable(error)}", file=sys.stderr)
        sys.exit(1 if isinstance(error, ClusterLost | ExportFailed | WorkersDied) else 2)
    except BrokenPipeError:  # who reads what is printed has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails once more at its end
        sys.exit(128 + 13)
    except Exception as error:
        sys.exit(_unexpected(error))


def _meant(error: UnknownOptionError) -> str:
    """A question for the flag that was probably meant, by the last part of its name; nothing where none is alike."""

    def last(flag: str) -> str:
        return flag.lstrip("-").rpartition(".")[2]

    known = [flag for argument in error.argument_collection or () if argument.parse for flag in argument.names]
    flags = {last(flag): flag for flag in sorted(known, key=len, reverse=True)}  # the shortest of those that end alike
    alike = get_close_matches(last(error.token.keyword or error.token.value), flags, n=1, cutoff=0.7)
    return f" Did you mean {flags[alike[0]]}?" if alike else ""


def _unexpected(error: Exception) -> int:
    """Report a full disk, a missing right or another error in a line; in debug mode with its traceback.

    Returns the exit status.
    """
    from pipeline.files import refusal
    from pipeline.text import one_line

    if os.environ.get("NIGHTSLIDE_DEBUG", "") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, OSError) and (words := refusal(error)):
        print(f"nightslide: {printable(words)}", file=sys.stderr)
        return 1
    print(
        f"nightslide: unexpected {type(error).__name__}: {one_line(error)}\n"
        f"If this looks like a fault of nightslide, please report it with the output of the same command with --debug "
        f"and of `nightslide doctor`.",
        file=sys.stderr,
    )
    return 1


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(group=COMMON)] = None,
    debug: Annotated[bool, Parameter(negative="", group=DEBUGGING)] = False,
) -> Any:
    """Read --config first, then the command.

    Parameters
    ----------
    config
        TOML file of settings, for run, plan, demo, export, measure and evaluate; flags take precedence.
    debug
        Show the traceback of an unexpected error; the same as NIGHTSLIDE_DEBUG=1.
    """
    if debug:
        os.environ["NIGHTSLIDE_DEBUG"] = "1"
    if config is not None:
        command = tokens[0] if tokens else ""
        require(command not in app or command in _CONFIGURED, f"{command} takes no settings: leave --config out")
        content = read_toml(config)
        check(content, config)  # an unknown key or a wrong value is an error that names the right ones
        # below the command's name: else cyclopts leaves out tables that have the name of a command, such as `export`
        app.config = tuple(Dict({name: _flags_of(name, content)}, source=str(config)) for name in tokens[:1])
    else:
        app.config = ()
    return app(tokens, result_action="return_value", exit_on_error=False, print_error=False)


def _flags_of(command: str, content: dict[str, Any]) -> dict[str, Any]:
    """What of a file of settings a command takes, by the names of its flags; those of `execution` have no prefix."""
    execution: dict[str, Any] = content.get("execution", {})
    tables = {name: table for name, table in content.items() if name != "execution"}
    match command:
        case "run" | "evaluate":
            return tables | execution
        case "plan":  # looks for slides as a run does
            return tables | {name: value for name, value in execution.items() if name == "follow_links"}
        case "measure":
            return {name: table for name, table in tables.items() if name == "regions"}
        case "export":  # whose own flags have none either
            export: dict[str, Any] = content.get("export", {})
            return export
    return tables


@app.command(group=SLIDES)
def run(
    inputs: Inputs,
    /,
    *,
    out: Out,
    mpp: Mpp = None,
    force_mpp: Mpp = None,
    settings: AllSettings = Settings(),
    execution: Annotated[Execution, Parameter(name="*", group=EXECUTION)] = Execution(),
) -> int:
    """Segment slides and write the results under --out; the same command resumes.

    Parameters
    ----------
    inputs
        Slides, folders (searched), or CSV manifests with the columns path and, if given, mpp; with --stage also URLs.
    out
        Folder of the results.
    mpp
        Micrometres per pixel at level 0, of slides that do not state it.
    force_mpp
        Micrometres per pixel at level 0, of all slides, whatever they or a manifest state.
    """
    from pipeline.archive.known import DONE_OTHERWISE
    from pipeline.archive.run import run as run_archive
    from pipeline.layout import RunFolder

    rows = run_archive(inputs, out, settings, execution, mpp=mpp, force_mpp=force_mpp)
    done = [r for r in rows if r.done]
    nuclei = sum(r.nuclei for r in done)
    print(
        f"{len(done)} of {counted(len(rows), 'slide')} done, {counted_nuclei(nuclei)}; ledger: {RunFolder(out).ledger}"
    )
    for status, words in (("failed", "failed"), (DONE_OTHERWISE, "not done again"), ("locked", "left to another run")):
        for row in (r for r in rows if r.status == status):
            print(f"  {words}: {row.slide}: {row.cause}", file=sys.stdout if status == "locked" else sys.stderr)
    return 0 if {r.status for r in rows} <= {"done", "done before", "skipped", "locked"} else 1


@app.command(group=SLIDES)
def plan(
    inputs: Inputs,
    /,
    *,
    mpp: Mpp = None,
    force_mpp: Mpp = None,
    seconds_per_mm2: Annotated[float | None, Parameter(group=COMMON)] = None,
    follow_links: Annotated[bool, Parameter(negative="", group=COMMON)] = Execution().follow_links,
    settings: AllSettings = Settings(),
) -> int:
    """Open every slide and estimate what a run would take, and what would fail; nothing is written.

    Parameters
    ----------
    inputs
        Slides, folders (searched), or CSV manifests with the columns path and, if given, mpp.
    mpp
        Micrometres per pixel at level 0, of slides that do not state it.
    force_mpp
        Micrometres per pixel at level 0, of all slides, whatever they or a manifest state.
    seconds_per_mm2
        Seconds for 1 mm2 of tissue in one view, from a finished run's ledger; without it, as measured on two CPU cores.
    follow_links
        Follow symbolic links in the input folders that lead out of them, too.
    """
    from pipeline.api import estimate, speed

    seconds = speed(settings, seconds_per_mm2)
    archive, warnings, estimates = estimate(
        inputs, settings, seconds, mpp=mpp, force_mpp=force_mpp, follow_links=follow_links, apart=True
    )
    rows = list(_tracked(estimates, "opening slides", sum(not source.skip for source in archive.sources)))
    print("\n".join(_table(rows)))
    for warning in warnings:
        print(f"WARNING: {warning}")
    bad, others = sum(bool(row.problem) for row in rows), counted(archive.skipped, "other file")
    print(
        f"{counted(len(rows), 'slide')} ({bad} will fail), {sum(r.tissue_mm2 for r in rows):.2f} mm2 of tissue, "
        f"time {_time(rows)}, disk {sum(r.disk_gb for r in rows):.3f} GB; {others} skipped"
    )
    print(_basis(seconds, seconds_per_mm2 is not None))
    return 1 if bad else 0


def _tracked(items: Iterable[T], doing: str, total: int) -> Iterator[T]:
    """The items, while a terminal, if there is one, shows how many of `total` have come; doing: in words."""
    from rich.console import Console
    from rich.progress import Progress

    terminal = Console(stderr=True)
    if not terminal.is_terminal:
        yield from items
        return
    with Progress(
        console=terminal,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # else what is printed would go to the terminal, not where it should
    ) as bar:
        yield from bar.track(items, total, description=doing)


def _table(rows: Sequence["SlideEstimate"]) -> list[str]:
    """The lines of `plan`: a slide each, below their headings."""
    names = [_shortened(printable(row.slide)) for row in rows]
    width = max(map(len, ["slide", *names]))
    lines = [f"{'slide':{width}}  {'um/px':>7}  {'tissue mm2':>10}  {'tiles':>6}  {'time':>8}  {'disk GB':>7}"]
    for name, row in zip(names, rows, strict=True):
        if row.problem:
            lines.append(f"{name:{width}}  WILL FAIL: {printable(row.problem)}")
        else:
            lines.append(
                f"{name:{width}}  {row.mpp:7.4f}  {row.tissue_mm2:10.2f}  {row.tiles:6}  {_time([row]):>8}  "
                f"{row.disk_gb:7.3f}"
            )
            lines += [f"{'':{width}}  NOTE: {note}" for note in row.notes]
    return lines


def _shortened(name: str) -> str:
    """A name that fits its column: the middle of a long one left out."""
    half = (_NAME_CHARS - 1) // 2
    return name if len(name) <= _NAME_CHARS else f"{name[:half]}…{name[-half:]}"


def _time(rows: Sequence["SlideEstimate"]) -> str:
    return duration(3600 * sum(row.hours for row in rows))


def _basis(seconds: float, given: bool) -> str:
    """The speed that the time is computed from."""
    own = (
        "for your machine give --seconds-per-mm2, from a finished run's ledger.csv: seconds_detect / tissue_mm2 / views"
    )
    if given:
        return f"time at {seconds:g} s per mm2 of tissue and view, as given"
    if math.isnan(seconds):
        return f"the time is not known: no speed has been measured for a GPU; {own}"
    return f"time on the CPU, at {seconds:g} s per mm2 of tissue and view as measured on two cores; {own}"


@app.command(group=RESULTS)
def export(folder: Path, /, *, settings: Annotated[Export, Parameter(name="*", group=EXPORT)] = Export()) -> int:
    """Write the files for QuPath and other programs again, from the tables of a finished run.

    Parameters
    ----------
    folder
        The --out folder of a run, or the folder of one slide in it.
    """
    from pipeline.api import export_files
    from pipeline.archive.verify import without_nuclei
    from pipeline.layout import RunFolder
    from pipeline.segment.finished import unnoted_exports

    for problem in (*settings.unused, *(f"not exported: {problem}" for problem in without_nuclei(folder))):
        print(f"WARNING: {problem}", file=sys.stderr)
    for path, exported in export_files(folder, settings):
        print(f"{printable(path)}: {exported}")
    for problem in filter(None, map(unnoted_exports, RunFolder(folder).with_nuclei())):
        print(f"WARNING: {printable(problem)}", file=sys.stderr)
    return 0


@app.command(group=RESULTS)
def qupath(folder: Path, /, *, slides: MovedSlides = None) -> int:
    """Write a QuPath project of all finished slides of a run, or add to it those that it lacks.

    Parameters
    ----------
    folder
        The --out folder of a run; the project is qupath/project.qpproj in it.
    """
    from pipeline.archive.qupath_project import write_project
    from pipeline.layout import RunFolder

    run = RunFolder(folder)
    written = write_project(run, slides)
    print(f"{written.file}: {counted(written.images, 'image')}, {written.added} of them new")
    for warning in written.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    command = ["QuPath", "script", str(run.qupath_script), "-p", str(written.file), "-s"]
    print(f"their nuclei: {shell_command(command)}")
    return 0


@app.command(group=RESULTS)
def measure(folder: Path, /, *, regions: Annotated[Regions, Parameter(name="*", group=REGIONS)] = Regions()) -> int:
    """Measure the nuclei of finished slides in regions drawn in QuPath, and write regions.csv; nothing is segmented.

    Parameters
    ----------
    folder
        The --out folder of a run, or the folder of one slide in it.
    """
    from pipeline.archive.measure import measure_slides
    from pipeline.layout import RunFolder

    failed = 0
    for measured in measure_slides(folder, regions):
        failed += measured.failed
        line = f"{measured.slide}: {'FAILED: ' if measured.failed else ''}{measured.words}"
        print(line, file=sys.stderr if measured.failed else sys.stdout)
    if (table := RunFolder(folder).regions).exists():
        print(f"regions: {printable(table)}")
    return 1 if failed else 0


@app.command(group=RESULTS)
def report(folder: Path, /) -> int:
    """Write report.html of a run again, after the run or while it is going on.

    Parameters
    ----------
    folder
        The --out folder of a run.
    """
    from pipeline.archive.ledger import read_ledger
    from pipeline.layout import RunFolder
    from pipeline.report.page import write_report

    run = RunFolder(folder)
    print(write_report(run, read_ledger(run)))
    return 0


@app.command(group=RESULTS)
def view(
    folder: Path,
    /,
    *,
    slides: MovedSlides = None,
    port: Annotated[int, Parameter(group=COMMON)] = 0,
) -> int:
    """Look at the slides of a run with their nuclei, in a browser on this machine.

    Parameters
    ----------
    folder
        The --out folder of a run.
    port
        Port of the loopback interface; 0: one that is free.
    """
    from pipeline.view.server import serve

    serve(folder, slides, port)
    return 0


@app.command(group=RESULTS)
def verify(folder: Path, /) -> int:
    """Compare every result of a run with the size and checksum in its slide.json, and say what differs.

    Parameters
    ----------
    folder
        The --out folder of a run, or the folder of one slide in it.
    """
    from pipeline.archive.verify import finished_slides, verify_results

    whole = slides = 0
    for slide, problems in _tracked(verify_results(folder), "comparing slides", len(finished_slides(folder))):
        slides, whole = slides + 1, whole + (not problems)
        for problem in problems:
            print(f"{slide}: {problem}")
    print(f"{whole} of {counted(slides, 'slide')} as written")
    return 0 if whole == slides else 1


@app.command(group=MACHINE)
def certificates(*, out: Out, days: Annotated[int, Parameter(group=COMMON)] = 365) -> int:
    """Make certificates with which a Dask cluster of several machines lets nobody else in (TLS).

    Parameters
    ----------
    out
        Folder of the certificates: every machine of the cluster needs it, and nobody else may read it.
    days
        How many days they are valid.
    """
    from pipeline.archive.certificates import write_certificates

    made = write_certificates(out, days)
    print(f"{made.ca}, {made.cert} and {made.key} are valid for {days} days; keep {made.key.name} secret")
    flags = {"--tls-ca-file": made.ca, "--tls-cert": made.cert, "--tls-key": made.key}
    given = shell_command(part for flag in flags.items() for part in flag)
    print(f"give them to scheduler, workers and run: {given}")
    return 0


@app.command(group=SLIDES)
def demo(
    *,
    out: Out = Path("nightslide-demo"),
    seed: Annotated[int, Parameter(group=COMMON)] = 0,
    settings: AllSettings = Settings(),
) -> int:
    """Draw a slide whose nuclei are known, segment it, and score the result against the truth.

    Parameters
    ----------
    out
        Folder of the slide and the results.
    seed
        Seed of the random slide.
    """
    from pipeline.demo import run_demo

    return run_demo(out, seed, settings)


@app.command(group=MACHINE)
def doctor() -> int:
    """Show versions, devices and weights, find conflicts with other packages, and test the detector."""
    from pipeline.doctor import check_up

    return check_up()
