"""The command `nightslide`: its flags are the fields of pipeline.config's dataclasses, never written again."""

import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Toml

from pipeline.config import Execution, Export, Settings, load
from pipeline.errors import ConfigError

Flat = Parameter(name="*")
Several = Parameter(negative="", consume_multiple=True)

app = App(
    name="nightslide",
    help="Segment every nucleus in H&E whole-slide images, and hand the result to QuPath.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
    version=lambda: metadata.version("nightslide"),
)
app.meta.suppress_keyboard_interrupt = False
app.command("training.cli:train", name="train")
app.command("training.cli:evaluate", name="evaluate")
app.command("training.cli:fit_stain", name="fit-stain")
app.command("training.cli:convert", name="convert")


def main(tokens: Sequence[str] | None = None) -> None:
    """Entry point. Exit status: 0 all done, 1 some slides failed, 2 wrong usage, 130 interrupted."""
    from pipeline.errors import ClusterLost, StainError
    from slides.errors import SlideError

    # what a batch system sends before it kills is Ctrl-C to us
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = app.meta(
            sys.argv[1:] if tokens is None else tokens,
            result_action="return_value",
            exit_on_error=False,
            print_error=False,
        )
        sys.exit(status)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)
    except ClusterLost as error:
        print(f"nightslide: {error}", file=sys.stderr)
        sys.exit(1)
    except (ConfigError, StainError, SlideError, CycloptsError) as error:
        print(f"nightslide: {error}", file=sys.stderr)
        sys.exit(2)


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(help="TOML file of settings; flags come on top.")] = None,
) -> Any:
    """Read --config first, then the command."""
    if config is not None:
        load(config)  # an unknown key or a wrong value is an error that names the right ones
        app.config = (Toml(config, must_exist=True, use_commands_as_keys=False),)
    else:
        app.config = ()
    return app(tokens, result_action="return_value", exit_on_error=False, print_error=False)


@app.command
def run(
    inputs: Annotated[list[Path], Several],
    *,
    out: Path,
    mpp: float | None = None,
    settings: Annotated[Settings, Flat] = Settings(),
    execution: Annotated[Execution, Flat] = Execution(),
) -> int:
    """Segment slides: files, folders (searched), or a CSV manifest with columns path and, if given, mpp.

    Parameters
    ----------
    inputs
        Slides, folders, manifests.
    out
        Folder of the results; the same command again continues where it stopped.
    mpp
        Micrometres per pixel at level 0, for slides that do not state it.
    """
    from pipeline.archive.run import run as run_archive

    rows = run_archive(inputs, out, settings, execution, mpp=mpp)
    failed = [r for r in rows if r.status == "failed"]
    done = [r for r in rows if r.done]
    print(
        f"{len(done)} of {len(rows)} slides done, {sum(r.nuclei for r in done):,} nuclei; ledger: {out / 'ledger.csv'}"
    )
    for row in failed:
        print(f"  failed: {row.slide}: {row.cause}", file=sys.stderr)
    elsewhere = [r for r in rows if r.status == "elsewhere"]
    return 0 if len(done) + len(elsewhere) == len(rows) else 1


@app.command
def plan(
    inputs: Annotated[list[Path], Several],
    *,
    mpp: float | None = None,
    seconds_per_mm2: float = 42.0,
    settings: Annotated[Settings, Flat] = Settings(),
) -> int:
    """Open every slide and say what a run would take, and what would fail; nothing is written.

    Parameters
    ----------
    inputs
        Slides, folders, manifests.
    mpp
        Micrometres per pixel at level 0, for slides that do not state it.
    seconds_per_mm2
        What a mm2 of tissue takes in one view: 42 s on two CPU cores; a finished run's ledger tells yours.
    """
    from pipeline.archive.estimate import estimate_slide
    from pipeline.archive.sources import find_slides

    archive = find_slides(inputs, mpp=mpp)
    rows = [estimate_slide(source, settings, seconds_per_mm2) for source in archive.sources]
    width = max(len(row.slide) for row in rows)
    print(f"{'slide':{width}}  {'um/px':>7}  {'tissue mm2':>10}  {'tiles':>6}  {'hours':>6}  {'disk GB':>7}")
    for row in rows:
        if row.problem:
            print(f"{row.slide:{width}}  WILL FAIL: {row.problem}")
        else:
            print(
                f"{row.slide:{width}}  {row.mpp:7.4f}  {row.tissue_mm2:10.2f}  {row.tiles:6}  {row.hours:6.2f}  "
                f"{row.disk_gb:7.3f}"
            )
    bad = sum(bool(row.problem) for row in rows)
    for unread in archive.unread:
        print(f"WARNING: {unread}")
    print(
        f"{len(rows)} slides ({bad} will fail), {sum(r.tissue_mm2 for r in rows):.1f} mm2 of tissue, "
        f"{sum(r.hours for r in rows):.2f} hours, {sum(r.disk_gb for r in rows):.2f} GB; "
        f"{archive.skipped} other files skipped"
    )
    return 1 if bad else 0


@app.command
def export(folder: Path, *, settings: Annotated[Export, Parameter(name="*")] = Export()) -> int:
    """Write the files for other tools again, from the tables of a finished run; no inference.

    Parameters
    ----------
    folder
        Folder of a run, or of one slide of it.
    """
    from pipeline.segment.stages import write_formats

    found = sorted(folder.rglob("nuclei.parquet"))
    if not found:
        raise ConfigError(f"{folder} holds no nuclei.parquet: need the --out folder of a run")
    for nuclei in found:
        for name, exported in write_formats(nuclei.parent, settings).items():
            print(f"{nuclei.parent / name}: {exported}")
    return 0


@app.command
def report(folder: Path) -> int:
    """Write report.html of a run again, while it goes on or afterwards.

    Parameters
    ----------
    folder
        The --out folder of a run.
    """
    from pipeline.archive.ledger import read_ledger
    from pipeline.report.page import write_report

    print(write_report(folder, read_ledger(folder)))
    return 0


@app.command
def demo(
    *,
    out: Path = Path("nightslide-demo"),
    seed: int = 0,
    settings: Annotated[Settings, Flat] = Settings(),
) -> int:
    """Draw a slide whose nuclei are known, segment it, and score the result against the truth.

    Parameters
    ----------
    out
        Folder of the slide and the results.
    seed
        Another seed draws another slide.
    """
    from pipeline.demo import run_demo

    return run_demo(out, seed, settings)


@app.command
def doctor() -> int:
    """Say what is installed, which devices there are, what is in the way, and whether it works."""
    from pipeline.doctor import check_up

    return check_up()
