"""The errors of slides, as one tree; pipeline.errors has the rest of it.

    NightslideError
    └── SlideError
        ├── SlideNotFound        (FileNotFoundError)  no such file
        ├── SlideUnreadable                           does not open: empty, truncated, not a slide, parts missing
        ├── SlideUnsupported                          in a format or compression that is not read
        ├── SlideTooLarge                             a tile or a picture would take gigabytes of memory
        ├── ScaleUnknown                              opens, but states no believable micrometres per pixel
        ├── RegionUnreadable                          opens, but this region cannot be decoded
        ├── GridError            (ValueError)         tile, margin and block do not make a grid
        └── StoreMismatch                             a patch store made with another configuration

Every message states the value, the rule and the remedy, and names the slide where one is meant.
"""


class NightslideError(Exception):
    """Root of everything that Nightslide raises on purpose: its message is for the user."""


class SlideError(NightslideError):
    """Root of everything that `slides` raises on purpose."""


class SlideNotFound(SlideError, FileNotFoundError):
    """There is no file at the slide's path."""


class SlideUnreadable(SlideError):
    """The file exists but is not a slide that can be read."""


class SlideUnsupported(SlideError):
    """The file is in a format, or compressed in a way, that the installed OpenSlide and Pillow do not read."""


class SlideTooLarge(SlideError):
    """A stored tile or a picture of the slide would take gigabytes of memory, or its copy more space than allowed."""


class ScaleUnknown(SlideError):
    """Neither the user nor the slide states one believable number of micrometres per pixel."""


class RegionUnreadable(SlideError):
    """A region of an otherwise readable slide cannot be decoded."""


class GridError(SlideError, ValueError):
    """Tile, margin and block do not make a grid, or a tile or block outside the grid is requested."""


class StoreMismatch(SlideError):
    """The patch store on disk belongs to another configuration or another grid."""
