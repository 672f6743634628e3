"""What the files in a slide's folder say of it, and that looking changes none of them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from pipeline import files
from pipeline.archive.inputs.sources import IN_MANIFEST, Source
from pipeline.archive.known import DONE_OTHERWISE, KnownSlides
from pipeline.config import Settings
from pipeline.errors import RunError
from pipeline.layout import RunFolder
from pipeline.segment.job import Job, Origin
from pipeline.segment.record import Counts, SlideRecord, StageRecord
from slides.scale import BY_DEFAULT, FORCED, GivenScale
from slides.slide import open_slide

SETTINGS = Settings()


class State(NamedTuple):
    """A slide, the results in its folder, and the command that looks at them."""

    results: bool = True
    round: str = ""  # of --overwrite, in which they were made
    asked: str = ""  # the round of the command
    whole: bool = True  # slide.json has the checksum that it states
    table: bool = True  # nuclei.parquet has the size that was written
    settings: bool = True  # they are those of the command
    mpp_source: str = BY_DEFAULT
    mpp: float = 0.25  # at which they were made; the slide states nothing, unless they say that it did
    given: GivenScale = GivenScale(default_mpp=0.25)
    same_stamp: bool = True  # the file has the size and date that it had
    same_file: bool = True
    lost: float = 0.0  # mm2
    where: str = "disk"  # or at a URL: "remote", or "copied" from there

    @property
    def scale(self) -> bool:
        """Whether the slide would be done at the same scale."""
        now = self.given.mpp or (self.given.default_mpp if self.mpp_source != "metadata" else None)
        return now is None or now == self.mpp

    @property
    def is_its_own(self) -> bool:
        """Whether it has its own scale again, which was not asked for."""
        return self.mpp_source in (FORCED, IN_MANIFEST) and self.given.mpp is None


STATES = st.builds(
    State,
    results=st.sampled_from([True, True, True, False]),
    round=st.sampled_from(["", "first", "second"]),
    asked=st.sampled_from(["", "", "first"]),
    whole=st.sampled_from([True, True, True, False]),
    table=st.sampled_from([True, True, True, False]),
    settings=st.sampled_from([True, True, True, False]),
    mpp_source=st.sampled_from([BY_DEFAULT, FORCED, IN_MANIFEST, "metadata"]),
    mpp=st.sampled_from([0.25, 0.25, 0.26]),
    given=st.sampled_from([GivenScale(), GivenScale(default_mpp=0.25), GivenScale(mpp=0.25, mpp_source=FORCED)]),
    same_stamp=st.booleans(),
    same_file=st.booleans(),
    lost=st.sampled_from([0.0, 0.5]),
    where=st.sampled_from(["disk", "disk", "remote", "copied"]),
)


class Remote(NamedTuple):
    """Stands for a slide at a URL, which may be asked for its size and date before it is copied."""

    path: Path
    copied: bool

    def origin(self) -> Origin:
        assert not self.copied, "what was copied may have another date by now"
        return Origin.of(self.path)


class Archive(NamedTuple):
    """One slide, its folder, and the quick hash of its file."""

    source: Source
    run: RunFolder
    quick_hash: str

    def job(self, state: State) -> Job:
        original = Origin.of(self.source.path) if state.where == "copied" else None
        return Job(
            self.source.path, self.run.slide("a"), SETTINGS, state.given, original=original, overwrite=state.asked
        )

    def source_in(self, state: State) -> Source:
        remote: Any = None if state.where == "disk" else Remote(self.source.path, state.where == "copied")
        return self.source._replace(remote=remote)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    folder = tmp_path_factory.mktemp("archive")
    path, run = folder / "a.png", RunFolder(folder / "out")
    Image.new("RGB", (64, 64), "white").save(path)
    run.slide("a").path.mkdir(parents=True)
    files.write_json(run.run_json, {"digest": SETTINGS.digest})
    with open_slide(path, mpp=1.0) as slide:
        yield Archive(Source(path, "a", GivenScale()), run, slide.quick_hash)


def prepare(archive: Archive, state: State) -> KnownSlides:
    """Write the results of a state, without failure.json. Returns what looks at them."""
    folder, stat = archive.run.slide("a"), archive.source.path.stat()
    for path in (folder.slide_json, folder.failure_json):
        path.unlink(missing_ok=True)
    folder.nuclei.write_bytes(b"123" if state.table else b"12")
    work = StageRecord(counts=Counts(area_lost_mm2=state.lost))
    record = SlideRecord("as it was called", "done", mpp=state.mpp, mpp_source=state.mpp_source, work=work)
    content = {
        "digest": archive.job(state).digest if state.settings else "of other settings",
        "overwrite": state.round,
        "quick_hash": archive.quick_hash if state.same_file else "0" * 64,
        "source_bytes": stat.st_size,
        "source_mtime_ns": stat.st_mtime_ns if state.same_stamp else 1,
        "files": {"nuclei.parquet": {"bytes": 3, "sha256": ""}},
        "record": record.to_json(),
    }
    if state.results:
        content = files.with_checksum(content)
        files.write_json(folder.slide_json, content if state.whole else {**content, "sha256": "of something else"})
    return KnownSlides(archive.run, SETTINGS, state.asked)


def expected(state: State) -> str:
    """What is to become of a slide: its status, "to do", or "refused" where its results are damaged."""
    if not state.results or (state.asked and state.round != state.asked):
        return "to do"
    if not (state.whole and state.table):
        return "refused"
    if not state.settings:
        return DONE_OTHERWISE
    if state.where == "remote" and state.is_its_own:
        return "to do"  # at least to copy, as only the content tells
    if not state.scale:
        return DONE_OTHERWISE
    if state.where == "remote" and not state.same_stamp:
        return "to do"
    if state.same_stamp or (state.same_file and not state.lost):
        return "done before"
    return DONE_OTHERWISE


def found(known: KnownSlides, archive: Archive, state: State) -> str:
    try:
        record = known.look(archive.source_in(state), archive.job(state))
    except RunError:
        return "refused"
    assert record is None or record.slide == "a"
    return "to do" if record is None else record.status


@given(STATES, st.booleans())
@example(State(), True)
@example(State(asked="first", round="first"), True)
@example(State(asked="first", round="second"), False)
@example(State(settings=False), False)
@example(State(mpp=0.26), False)
@example(State(mpp=0.5, mpp_source="metadata"), True)
@example(State(where="remote"), True)
@example(State(mpp_source=FORCED, given=GivenScale(mpp=0.25), where="remote"), True)
@example(State(mpp_source=FORCED, given=GivenScale(default_mpp=0.26)), False)
@example(State(mpp_source=FORCED, given=GivenScale(mpp=0.26)), False)
@example(State(mpp_source=BY_DEFAULT, given=GivenScale(mpp=0.26)), False)
@example(State(same_stamp=False, lost=0.5), False)
@example(State(same_stamp=False), False)
@example(State(same_stamp=False, where="remote"), True)
@example(State(same_stamp=False, where="copied"), True)
@example(State(mpp_source=FORCED, where="remote"), False)
@example(State(mpp_source=FORCED, where="copied"), False)
@example(State(same_stamp=False, same_file=False), False)
def test_results_are_done_kept_or_to_be_made(archive: Archive, state: State, failed: bool) -> None:
    """Law: a slide is done again only where there is no slide.json, or one of another round; no result is touched.

    One at a URL is to do where only its content tells, and then is looked at again once it is copied. A former failure
    goes once the slide is done as was asked.
    """
    known, folder = prepare(archive, state), archive.run.slide("a")
    if failed:
        files.write_json(folder.failure_json, {"cause": "of yesterday"})
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    outcome = expected(state)
    assert found(known, archive, state) == outcome
    if outcome == "done before":
        before.pop(folder.failure_json, None)
    assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


@given(STATES)
def test_what_is_done_is_told_without_a_look_at_the_results(archive: Archive, state: State) -> None:
    """Law: for the rows of other commands, and to know whether another run was faster."""
    known = prepare(archive, state)
    there = state.results and state.asked in ("", state.round)
    assert known.is_done(archive.job(state)) == there
    for record in (known.finished("a"), known.elsewhere("a")):
        assert (record is not None) == (there and state.whole)
        assert record is None or (record.slide, record.status) == ("a", "done")


@given(STATES)
def test_a_slide_that_has_a_problem_keeps_its_results(archive: Archive, state: State) -> None:
    known = prepare(archive, state)
    source = archive.source._replace(problem="it does not exist")
    if state.results and state.whole and state.asked in ("", state.round):
        record = known.look(source, archive.job(state))
        assert record is not None
        assert (record.status, record.cause) == (DONE_OTHERWISE, "it does not exist")
        assert "not done again: it does not exist" in record.remarks
    else:
        with pytest.raises(RunError, match="it does not exist"):
            known.look(source, archive.job(state))


@pytest.mark.parametrize("seconds", [-86_400, 86_400])
def test_a_failure_counts_once_another_run_has_written_it(archive: Archive, seconds: int) -> None:
    """Law: one from before is tried again, a new one is not, whatever the clocks say."""
    nothing = State(results=False)
    known, failure = prepare(archive, nothing), archive.run.slide("a").failure_json
    files.write_json(failure, {"cause": "of yesterday"})
    for _ in range(2):
        assert known.look(archive.source, archive.job(nothing)) is None
        assert known.elsewhere("a") is None
    files.write_json(failure, {"cause": "new"})
    then = failure.stat().st_mtime + seconds
    os.utime(failure, (then, then))
    for record in (known.look(archive.source, archive.job(nothing)), known.elsewhere("a")):
        assert record == SlideRecord("a", "failed", "new")
    failure.unlink()
    assert known.look(archive.source, archive.job(nothing)) is None
    first = prepare(archive, nothing)
    assert first.elsewhere("a") is None
    files.write_json(failure, {"cause": "the first"})
    assert first.elsewhere("a") == SlideRecord("a", "failed", "the first")


def test_a_folder_that_is_gone_or_of_another_run_is_not_looked_into(archive: Archive, tmp_path: Path) -> None:
    """A slide of it is not to do: it would be made where nobody looks for it, or with two kinds of settings."""
    run = RunFolder(tmp_path / "out")
    known, job = KnownSlides(run, SETTINGS, ""), archive.job(State())
    with pytest.raises(FileNotFoundError):
        known.look(archive.source, job)
    assert not run.path.exists()
    run.path.mkdir()
    files.write_json(run.run_json, {"digest": "another"})
    with pytest.raises(RunError, match="another run was started"):
        known.look(archive.source, job)
    files.write_json(run.run_json, {"digest": SETTINGS.digest})
    (run.path / "a").symlink_to(tmp_path)
    with pytest.raises(RunError, match="is a symbolic link, through which nothing is written"):
        known.look(archive.source, job)
