"""What the ledger says of every slide of a command, when it is written, and what is said at the end."""

import asyncio
import errno
import itertools
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.archive import ledger, slide_records
from pipeline.archive.command import Command
from pipeline.archive.inputs.sources import Archive, Source
from pipeline.archive.known import KnownSlides
from pipeline.archive.ledger import OtherSlides
from pipeline.archive.progress import Progress
from pipeline.archive.slide_records import SlideRecords
from pipeline.config import Execution, Settings, Stain
from pipeline.layout import RunFolder
from pipeline.segment.record import SlideRecord, StageRecord
from slides.scale import GivenScale

OTHERS = (SlideRecord("other", "done", stain="none", work=StageRecord(computed_on=("cpu float32",))),)


class Known(KnownSlides):
    """Of a folder in which other runs have left some records; an error is the answer of a file server."""

    found: SlideRecord | OSError | None = None
    left: tuple[SlideRecord, ...] = ()

    def elsewhere(self, name: str) -> SlideRecord | None:
        if isinstance(self.found, OSError):
            raise self.found
        return self.found

    def others(self, own: Collection[str]) -> OtherSlides:
        return OtherSlides([record for record in self.left if record.slide not in own], {})


class Made(NamedTuple):
    """The records of a command for the slides a and b."""

    records: SlideRecords
    known: Known
    run: RunFolder
    said: list[str]
    progress: Progress


Make = Callable[..., Made]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(settings: Settings = Settings()) -> Made:
        run, said = RunFolder(tmp_path), list[str]()
        run.logs.mkdir(exist_ok=True)
        archive = Archive(tuple(Source(tmp_path / f"{name}.svs", name, GivenScale()) for name in "ab"), 0)
        known, progress = Known(run, settings, ""), Progress(run.logs, 2, said.append)
        records = SlideRecords(Command(archive, run, settings, Execution()), known, progress)
        return Made(records, known, run, said, progress)

    return made


def test_a_slide_has_one_record_whatever_is_known_of_it(make: Make) -> None:
    """Law: what became of it here, then what another run made of it, then who has it, then how far it came."""
    done, locked, elsewhere = (SlideRecord("a", status) for status in ("done", "locked", "failed"))
    for own, found, begun, ended in itertools.product(
        (None, done, locked), (None, elsewhere, OSError()), (False, True), (False, True)
    ):
        records, known, *_ = make()
        known.found = found
        if begun:
            records.begin("a")
        if own is not None:
            records.end("a", own)
        if ended:
            records.end_all()
        expected = (
            done
            if own is done
            else elsewhere
            if found is elsewhere
            else own or SlideRecord("a", "waiting" if not begun else "interrupted" if ended else "unfinished")
        )
        assert records.all()[0] == expected


def test_the_ledger_is_written_when_a_slide_has_begun_or_ended_but_not_all_the_time(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: twenty times as long as it took to write passes before the next."""
    now, written = [100.0], list[float]()

    def write(*_: object) -> None:
        written.append(now[0])
        now[0] += 2.0  # seconds, of a clock that stands still otherwise

    monkeypatch.setattr(slide_records, "_POLL_S", 0.001)
    monkeypatch.setattr(slide_records, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(ledger, "write_ledger", write)
    records = make().records

    async def follow() -> None:
        keeping = asyncio.create_task(records.keep_ledger())
        for change, at in [
            (lambda: None, 50.0),
            (lambda: records.begin("a"), 100.0),
            (lambda: None, 500.0),
            (lambda: records.end("a", SlideRecord("a", "done")), 1000.0),
            (lambda: records.begin("b"), 1041.9),
            (lambda: None, 1042.0),
        ]:
            now[0] = at
            change()
            await asyncio.sleep(0.1)
        keeping.cancel()

    asyncio.run(follow())
    assert written == [100.0, 1000.0, 1042.0]


def test_an_error_of_the_ledger_is_said_once_and_it_is_written_all_the_same(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood still from then on, without a word: a folder of another command's slide may hold anything."""
    tries: list[int] = []

    def write(*_: object) -> None:
        tries.append(len(tries))
        if len(tries) < 4:
            raise ValueError(f"try {len(tries)}")

    monkeypatch.setattr(slide_records, "_POLL_S", 0.001)
    monkeypatch.setattr(slide_records, "_LEDGER_SHARE", 0)
    monkeypatch.setattr(ledger, "write_ledger", write)
    records, _, _, said, _ = make()
    records.begin("a")

    async def follow() -> None:
        keeping = asyncio.create_task(records.keep_ledger())
        await asyncio.sleep(0.5)
        assert not keeping.done()
        keeping.cancel()

    asyncio.run(follow())
    assert len(tries) == 4
    assert [line for line in said if "ledger" in line] == [
        "WARNING: writing ledger.csv failed (ValueError: try 1); it is tried again, this is said once"
    ]


def test_what_a_reader_should_know_of_all_slides_is_said_at_the_end(make: Make) -> None:
    """Law: of this command's slides and those that others left; of stains only where the slides choose them."""
    for method in ("none", "auto"):
        for others in ((), OTHERS):
            records, known, run, said, _ = make(Settings(stain=Stain(method)))
            known.left = others
            work = StageRecord(computed_on=("cuda bfloat16",))
            for name in "ab":
                records.end(name, SlideRecord(name, "done", stain="macenko", work=work))
            assert [record.slide for record in records.publish()] == ["a", "b"]
            assert any(line.startswith("WARNING: slides were computed on cpu") for line in said) == bool(others)
            assert any(line.startswith("stain normalisation: ") for line in said) == bool(others and method == "auto")
            assert said[-1] == f"report: {run.report}"
            assert len(said) == 1 + bool(others) + bool(others and method == "auto")


@pytest.mark.parametrize("refused", ["ledger", "report"])
def test_the_ledger_and_the_report_are_written_whatever_becomes_of_the_other(
    make: Make, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, _, run, said, _ = make()
    records.end("a", SlideRecord("a", "failed", "it is damaged"))
    failing, written, other = (
        ("ledger.write_ledger", run.ledger, run.report)
        if refused == "ledger"
        else ("write_report", run.report, run.ledger)
    )

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "", str(written))

    monkeypatch.setattr(f"pipeline.archive.slide_records.{failing}", refuse)
    records.publish()
    assert [line.partition(f"{written}: ")[0] for line in said if "WARNING" in line] == [
        f"WARNING: {written.name} could not be written: "
    ]
    assert not written.exists()
    assert "it is damaged" in other.read_text(encoding="utf-8")


def test_a_slide_that_ends_counts_in_the_progress(make: Make) -> None:
    records, *_, progress = make()
    records.end("a", SlideRecord("a", "failed"))
    assert progress.line().startswith("1/2 slides, 1 failed")
    records.end("b", SlideRecord("b", "locked"))
    assert progress.line().startswith("2/2 slides, 1 failed")
