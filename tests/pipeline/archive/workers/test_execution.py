"""The executor of a run is the one that its settings name; what cannot be had is refused before anything is started."""

from pathlib import Path
from typing import Any

import dask.distributed  # whose defaults replace what was set before
import pytest

from pipeline.archive.workers.execution import check_execution, open_executor, starts_processes
from pipeline.config import Execution
from pipeline.errors import ConfigError


@pytest.mark.parametrize("execution", [Execution(scheduler="tcp://127.0.0.1:8786"), Execution(cluster=False)])
def test_a_script_whose_run_starts_no_workers_needs_no_main(execution: Execution) -> None:
    """Nothing is asked in a process of its own, which would import the script again."""
    assert starts_processes(Execution())
    assert not starts_processes(execution)
    assert not starts_processes(Execution(), client=object())


def test_a_scheduler_that_is_not_there_is_named() -> None:
    with (
        pytest.raises(ConfigError, match=r"nowhere\.json does not exist"),
        open_executor(Execution(scheduler_file="nowhere.json")),
    ):
        pass
    with pytest.raises(ConfigError, match="need one of them"):
        Execution(scheduler="tcp://a:1", scheduler_file="b")
    with pytest.raises(ConfigError, match="this machine has 0"), open_executor(Execution(gpus=3), "cpu"):
        pass


def test_files_of_tls_are_checked_before_anything_is_started(tmp_path: Path) -> None:
    """The address is nobody's: it is not even tried."""
    for name in ("ca", "cert", "key"):
        (tmp_path / name).write_text("no certificate")
    given: dict[str, Any] = {f"tls_{name}": str(tmp_path / name.split("_")[0]) for name in ("ca_file", "cert", "key")}
    (tmp_path / "scheduler.json").write_text('{"address": "tls://127.0.0.1:9"}')
    for name, text in (("empty", "{}"), ("list", "[1]"), ("text", "no JSON")):
        (tmp_path / f"{name}.json").write_text(text)
    in_file = str(tmp_path / "scheduler.json")
    for execution, message in (
        (Execution(scheduler="tls://127.0.0.1:9"), "need --tls-ca-file, --tls-cert and --tls-key"),
        (Execution(scheduler_file=in_file), "need --tls-ca-file, --tls-cert and --tls-key"),
        *(
            (Execution(scheduler_file=str(tmp_path / f"{n}.json")), "holds no address")
            for n in ("empty", "list", "text")
        ),
        (Execution(scheduler_file=str(tmp_path)), "holds no address"),
        (Execution(scheduler="wss://127.0.0.1:9"), "need --tls-ca-file, --tls-cert and --tls-key"),
        (Execution(scheduler="tls://127.0.0.1:9", **given), "need certificates and key in PEM"),
        (Execution(scheduler="tls://127.0.0.1:9", **{**given, "tls_key": "none"}), "tls-key=none does not exist"),
        (Execution(scheduler="tcp://127.0.0.1:9", **given), "need one that was started with them, at tls://"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_execution(execution, "auto")
        with pytest.raises(ConfigError, match=message), open_executor(execution):
            pass


@pytest.mark.parametrize("lacking", ["ca-file", "client.cert", "client.key"])
def test_files_of_tls_may_be_those_of_dask_s_configuration_but_all_three(lacking: str, tmp_path: Path) -> None:
    (tmp_path / "file.pem").touch()
    tls = {
        f"distributed.comm.tls.{name}": str(tmp_path / "file.pem") for name in ("ca-file", "client.cert", "client.key")
    }
    del tls[f"distributed.comm.tls.{lacking}"]
    with dask.config.set(tls):
        with pytest.raises(ConfigError, match="need --tls-ca-file, --tls-cert and --tls-key"):
            check_execution(Execution(scheduler="tls://127.0.0.1:9"), "auto")
        check_execution(Execution(scheduler="tcp://127.0.0.1:9"), "auto")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nothing://127.0.0.1:1"])
def test_a_scheduler_that_does_not_answer_is_named_with_the_remedy(address: str, tmp_path: Path) -> None:
    """Nobody listens at the first; the file of the second is of no Dask that is known."""
    (tmp_path / "scheduler.json").write_text(f'{{"address": "{address}"}}')
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "300ms"}),
        pytest.raises(ConfigError, match=rf"no Dask scheduler answers at {address}: .*is it started, and with TLS\?"),
        open_executor(Execution(scheduler_file=str(tmp_path / "scheduler.json"))),
    ):
        pass
