"""`nightslide view`: serves the results of a run to a browser on this machine.

It listens on the loopback interface only. Every address begins with a token that is made at the start; the Host header
must name this machine, so that no page from elsewhere reaches the server under a name of its own; and the pages may
load nothing from anywhere else. Slides are named by their numbers: no path of a file comes from the browser.
"""

import contextlib
import secrets
import socket
from pathlib import Path

from pipeline.config import require
from pipeline.errors import ConfigError
from pipeline.layout import RunFolder
from pipeline.text import shell_command
from pipeline.view.results import Results

HOST = "127.0.0.1"


def serve(folder: Path, slides: Path | None, port: int) -> None:
    """Show the results of a run until Ctrl-C; the address is printed.

    folder: of a run; slides: where slides are that have moved since; port: 0 for a free one.
    Raises ConfigError without the extra `view`, for a folder that holds no run, and for a port that cannot be used.
    """
    try:
        import uvicorn

        from pipeline.view.application import application
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'the viewer needs the package {error.name}, which is not installed: pip install "nightslide[view]"'
        ) from error
    results = Results(RunFolder(folder), slides)
    with listening(port) as listener:
        port, token = listener.getsockname()[1], secrets.token_urlsafe()
        config = uvicorn.Config(
            application(results, token, port),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
        )
        print(f"{shell_command([folder])}: http://{HOST}:{port}/{token}/  (end with Ctrl-C)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn passes it on, but not always
            uvicorn.Server(config).run(sockets=[listener])
        print("ended")


def listening(port: int) -> socket.socket:
    """A socket that is bound to a port of the loopback interface. Raises ConfigError."""
    require(0 <= port < 2**16, f"port={port}: need 1 to 65535, or 0 for a free one")
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"port={port} cannot be used ({error.strerror}): need one that is free; give another --port, or none"
        ) from error
    return listener
