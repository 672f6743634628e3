"""What can go wrong, as one tree; the command prints the message of anything in it, never a traceback.

    NightslideError                                  slides.errors: the root of everything raised on purpose
    ├── SlideError                                   slides.errors: a slide; see there for what lies below it
    │   └── SlideChanged                             not the file, or not the scale, that the results are of
    ├── ConfigError          (ValueError)            a setting that is misspelt, of a wrong type, out of range
    │   ├── RunError                                 inputs or an output folder that a run cannot start with
    │   ├── WeightsError                             a weights file: missing, damaged, of another architecture
    │   └── training's AnnotationError               a dataset that cannot be read
    ├── StainError           (ValueError)            pixels that show no stain, stains that do not fit together
    ├── LeaseLost                                    another process has taken the slide over
    ├── ScratchLost                                  work of a block is missing or damaged: it is made again
    ├── ClusterLost                                  the Dask scheduler is gone
    └── WorkersDied                                  every worker process that tried a task died

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
    """A weights file that is missing, damaged, not ours, or of another architecture."""


class StainError(NightslideError, ValueError):
    """Pixels that show no stain, or stains that do not fit together or the method."""


class LeaseLost(NightslideError):
    """Another process has taken the slide over; what it holds stays as it is."""


class ScratchLost(NightslideError):
    """Scratch of a block is missing or damaged, though it was made: the block is done again."""


class ClusterLost(NightslideError):
    """The Dask scheduler is gone, and with it the tasks in flight; what was committed stays."""


class WorkersDied(NightslideError):
    """Every worker process that tried a task died of it."""
