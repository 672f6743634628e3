"""Comparing views: each choice is what the detector would be shown."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import Settings, Stain
from pipeline.errors import ConfigError
from pipeline.model import fuse, views
from training.cli import EvaluationExecution

SCRIPTS = Path(__file__).parents[2] / "workflows" / "experiments"


def test_each_choice_is_what_the_detector_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import views as script

    labels = np.zeros((64, 64), np.uint16)
    labels[20:40, 20:40] = 1
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    Image.new("RGB", (64, 64), "pink").save(tmp_path / "images" / "a.png")
    Image.fromarray(labels).save(tmp_path / "labels" / "a.png")
    shown, every, infer = list[tuple[views.View, ...]](), views.choose_views(8), fuse.infer

    def recorded(model: Any, images: Any, chosen: tuple[views.View, ...], *others: Any) -> Any:
        shown.append(chosen)
        return infer(model, images, chosen, *others)

    monkeypatch.setattr(fuse, "infer", recorded)
    plain = Settings(stain=Stain(method="none"))
    assert script.compare(data=[tmp_path], mpp=(0.25,), choice=("0", "0,5"), score=(0.6, 0.7), settings=plain) == 0
    assert shown == [every[:1], (every[0], every[5])]
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["| 0", "| 0,5"]
    with pytest.raises(ConfigError, match="need --stain none"):
        script.compare(data=[tmp_path], mpp=(0.25,), settings=plain, execution=EvaluationExecution(cluster=True))
    with pytest.raises(ConfigError, match="need --stain none"):
        script.compare(data=[tmp_path], mpp=(0.25,))
    for wrong in ("0,0", "0,8", "0,1,2", "", "0,x"):
        with pytest.raises(ConfigError, match=f"choice={wrong}: need 1, 2, 4 or 8 different numbers, 0 to 7"):
            script.parse(wrong)
