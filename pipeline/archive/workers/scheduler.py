"""A Dask scheduler that is running already: its address, its TLS files, a client of it.

One of the three files that import Dask, beside `local_cluster` and `machine`.
"""

import json
import logging
import os
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import Execution
from pipeline.errors import ConfigError

_SILENT_S = 11  # after which a scheduler whose machine acknowledges nothing is lost: the shortest that Dask permits


def check_scheduler(execution: Execution) -> None:
    """Raise ConfigError for what `connect` would refuse without asking the scheduler."""
    _security(execution, _address(execution))


@contextmanager
def connect(execution: Execution) -> Iterator[Any]:
    """A client of the scheduler that is named. Raises ConfigError where none answers."""
    import dask
    from distributed import Client

    address = _address(execution)
    security = _security(execution, address)
    try:
        with dask.config.set({"distributed.comm.timeouts.tcp": f"{_SILENT_S}s"}):
            client = Client(address, security=security, set_as_default=False)
    except (OSError, ValueError) as error:
        hint = "; is it started, and with TLS? then give tls://... and the three --tls- flags"
        if address.startswith("tls://"):
            hint = "; are its certificates of the same authority as yours?"
        raise ConfigError(f"no Dask scheduler answers at {address}: {error}{hint}") from error
    # `run_task` reports a lost scheduler in one line
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    with client:
        yield client


def _address(execution: Execution) -> str:
    """The address of the scheduler that is named, or whose file is."""
    if execution.scheduler:
        return execution.scheduler
    file, remedy = execution.scheduler_file, "need the file of `dask scheduler --scheduler-file`"
    if not os.path.exists(file):
        raise ConfigError(f"scheduler-file={file} does not exist: {remedy}")
    try:
        return str(json.loads(Path(file).read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"scheduler-file={file} holds no address: {remedy}") from error


def _security(execution: Execution, address: str) -> Any:
    """Dask's settings of TLS for a scheduler at `address`: the given files, or those of Dask's configuration.

    Raises ConfigError where files and address do not go together, and for files that are not there, cannot be used
    or are not valid any more.
    """
    from distributed import Security

    given = execution.tls if any(execution.tls.values()) else {}
    encrypted = address.startswith(("tls://", "wss://"))
    if given and not encrypted:
        raise ConfigError(f"TLS files for a scheduler at {address}: need one that was started with them, at tls://")
    for name, file in given.items():
        if not os.path.isfile(file):
            raise ConfigError(
                f"{name.replace('_', '-')}={file} does not exist: need a file of `nightslide certificates`"
            )
    of_client = {name.replace("tls_", "tls_client_") if name != "tls_ca_file" else name: f for name, f in given.items()}
    security: Any = Security(**of_client)
    if not encrypted:
        return security
    if not (security.tls_ca_file and security.tls_client_cert and security.tls_client_key):
        raise ConfigError(
            f"scheduler={address} without its certificates: need --tls-ca-file, --tls-cert and --tls-key, "
            f"the files that the scheduler was started with"
        )
    files = ", ".join(str(file) for file in of_client.values()) or "those of Dask's configuration"
    try:
        context = security.get_connection_args("client")["ssl_context"]
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"TLS files {files} cannot be used ({error}): need certificates and key in PEM") from error
    # of Dask one would hear that they do not match; `nightslide certificates` lets all three end together
    ends = [certificate["notAfter"] for certificate in context.get_ca_certs()]
    last = max(ends, key=ssl.cert_time_to_seconds, default=None)
    if last is not None and ssl.cert_time_to_seconds(last) < time.time():
        raise ConfigError(
            f"TLS files {files}: their authority was valid until {last}: make new ones with `nightslide "
            f"certificates`, give them to scheduler and workers, and start these again"
        )
    return security
