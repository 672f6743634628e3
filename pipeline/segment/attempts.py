"""When a slide was worked on: attempts, all but the last of which were interrupted."""

import time

from pipeline import files
from pipeline.layout import SlideFolder

Attempt = tuple[float, float]
"Start and end, seconds since 1970 by this machine's clock."


def begin(folder: SlideFolder, started: float) -> list[Attempt]:
    """Note in the work folder that an attempt began at `started`, and return the attempts before it. Safe to repeat.

    When an attempt was interrupted is recorded nowhere, so it is taken to have ended when its last block was written.
    An attempt that finished no block is left out.
    """
    noted = files.read_checked_json(folder.attempts) or {"before": [], "started": started}
    before: list[Attempt] = [(since, until) for since, until in noted["before"]]
    if noted["started"] != started:
        blocks = folder.instances(0).parent.glob(f"*{folder.instances(0).suffix}")
        ahead = files.now_ns(folder.work) / 1e9 - time.time()  # the clock that stamps the blocks may be a server's
        ended = max((block.stat().st_mtime for block in blocks), default=0.0) - ahead
        if ended > noted["started"]:
            before.append((noted["started"], ended))
    files.write_checked_json(folder.attempts, {"before": before, "started": started}, synced=False)
    return before
