"""The executor of a run is the one that its settings name; what cannot be had is refused before anything is started."""

from pathlib import Path
from typing import Any

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
    (tmp_path / "empty.json").write_text("{}")
    in_file = str(tmp_path / "scheduler.json")
    for execution, message in (
        (Execution(scheduler="tls://127.0.0.1:9"), "need --tls-ca-file, --tls-cert and --tls-key"),
        (Execution(scheduler_file=in_file), "need --tls-ca-file, --tls-cert and --tls-key"),
        (Execution(scheduler_file=str(tmp_path / "empty.json")), "holds no address"),
        (Execution(scheduler="tls://127.0.0.1:9", **given), "need certificates and key in PEM"),
        (Execution(scheduler="tls://127.0.0.1:9", **{**given, "tls_key": "none"}), "tls-key=none does not exist"),
        (Execution(scheduler="tcp://127.0.0.1:9", **given), "need one that was started with them, at tls://"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_execution(execution, "auto")
        with pytest.raises(ConfigError, match=message), open_executor(execution):
            pass
