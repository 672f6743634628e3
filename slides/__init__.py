"""Whole-slide images: opening, scale, tissue, tiles, patches.

    import slides

    with slides.open_slide("case7.svs") as slide:
        slide.scale, slide.size

`open_slide` is imported when it is first used, so that `import slides` loads nothing heavy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slides.slide import open_slide

__all__ = ["open_slide"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from slides.slide import open_slide

    return open_slide


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
