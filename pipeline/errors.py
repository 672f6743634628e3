"""The errors of Nightslide, as one tree; the command prints their messages, never a traceback.

    NightslideError                                  slides.errors: the root of everything raised on purpose
    ├── SlideError                                   slides.errors: of a slide; see there for its subclasses
    │   └── SlideChanged                             another file, or another scale, than the results are of
    ├── ConfigError          (ValueError)            a setting that is misspelt, of a wrong type, out of range
    │   ├── RunError                                 inputs or an output folder that a run cannot start with
    │   ├── WeightsError                             a weights file: missing, damaged, of another architecture
    │   └── AnnotationError                          annotations or a dataset that cannot be read
    ├── StainError           (ValueError)            pixels that show no stain, stains that do not fit together
    ├── ExportFailed                                 slides whose files could not be written; those of the others are
    ├── LeaseLost                                    another process has taken the slide over
    ├── ScratchLost                                  scratch of a block is missing or damaged: it is made again
    ├── ClusterLost                                  the Dask scheduler is gone
    │   └── DeviceLost                               a GPU does nothing more
    └── WorkersDied                                  every worker process that tried a task, or one of a training, died

Every message states the value, the rule and the remedy.
"""

from slides.errors import NightslideError, SlideError


class SlideChanged(SlideError):
    """The slide is not the one, or not at the scale, that the work in this folder was started on."""


class ConfigError(NightslideError, ValueError):
    """A setting that is misspelt, of the wrong type, or outside its range."""


class RunError(ConfigError):
    """Inputs or an output folder that a run cannot start with."""


class WeightsError(ConfigError):
    """A weights file that is missing, damaged, not of Nightslide, or of another architecture."""


class AnnotationError(ConfigError):
    """Annotations or a dataset that are incomplete or contradict themselves; the message names file and rule."""


class StainError(NightslideError, ValueError):
    """Pixels that show no stain, or stains that do not fit together or the method."""


class ExportFailed(NightslideError):
    """Slides whose files for other programs could not be written, a line each; those of the others are."""


class LeaseLost(NightslideError):
    """Another process has taken the slide over; its files are left alone."""


class ScratchLost(NightslideError):
    """Scratch of a block is missing or damaged, although it was made: the block is processed again."""


class ClusterLost(NightslideError):
    """The Dask scheduler is gone, and with it the tasks in flight; what was committed stays."""


class DeviceLost(ClusterLost):
    """A GPU does nothing more in this process, whatever it is asked: each slide that it is given would fail."""


class WorkersDied(NightslideError):
    """Every worker process that tried a task died of it, or one that a training needs died."""
