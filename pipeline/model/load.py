"""Networks, each loaded once per process, content of its file and device, and prepared for inference there.

A file's content counts, not its path: a file that is replaced is another network. A run puts the
SHA-256 of every file that its results depend on into the settings: a file of other content is refused.
"""

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from pipeline.config import Detector, Stain
from pipeline.model import dcgmm
from pipeline.model.dcgmm import ClusterNet
from pipeline.model.deterministic import pointwise
from pipeline.model.device import autocast, choose_device, choose_precision
from pipeline.model.fitted_stain import Normalisation
from pipeline.model.stain import Normaliser
from pipeline.model.weights import check_content, find_weights

if TYPE_CHECKING:
    from pipeline.model.detector import NucleusDetector

M = TypeVar("M", bound=nn.Module)

CPU = torch.device("cpu")


class LoadedDetector(NamedTuple):
    """A detector on its device, ready for inference."""

    model: "NucleusDetector"
    device: torch.device
    precision: torch.dtype

    def autocast(self) -> torch.autocast:
        """The context in which it computes in its precision."""
        return autocast(self.device, self.precision)


def detector(settings: Detector) -> LoadedDetector:
    """The detector of these settings on their device.

    Raises WeightsError where the file is missing, damaged, or has other content; ConfigError where the device is.
    """
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    # a GPU holds the weights as autocast would cast them for every batch
    dtype = torch.float32 if device.type == "cpu" else precision
    model = _detectors.get(find_weights(settings.weights), (device, dtype), settings.weights_sha256)
    return LoadedDetector(model, device, precision)


def stain_network(settings: Stain, device: torch.device = CPU) -> ClusterNet | None:
    """The network of dcgmm on a device; None for the other methods. Fitting takes it on the CPU, the default.

    Raises WeightsError where the file is missing, damaged, or has other content.
    """
    if settings.method != "dcgmm":
        return None
    return _stain_networks.get(find_weights(settings.weights), (device, torch.float32), settings.weights_sha256)


def normaliser(normalisation: Normalisation, settings: Stain, device: torch.device) -> Normaliser:
    """The normaliser of a slide on a device, made once for all of the slide's batches; see `stain_network`.

    A slide whose stain could not be fitted is not normalised, whatever the method of the settings.
    """
    fitted = normalisation.source.method == settings.method
    return _normaliser(normalisation, stain_network(settings, device) if fitted else None, device)


@functools.lru_cache(maxsize=4)  # several slides of a run share a device
def _normaliser(normalisation: Normalisation, network: ClusterNet | None, device: torch.device) -> Normaliser:
    with torch.inference_mode(False):  # it outlives the caller's mode
        return Normaliser(normalisation, network, device)


class _Networks(Generic[M]):
    """Networks of one kind, each loaded once per content, device and dtype; the two last used are kept."""

    def __init__(self, load: Callable[[Path, torch.device], M]) -> None:
        self._load = load
        self._loaded: dict[tuple[str, torch.device, torch.dtype], M] = {}  # the least recently used first
        self._lock = threading.Lock()

    def get(self, path: Path, place: tuple[torch.device, torch.dtype], recorded: str) -> M:
        if place[0].type == "cuda":  # by default cuDNN's convolutions round what is float32 to the ten bits of TF32
            torch.backends.cudnn.allow_tf32 = False
        with self._lock:
            sha256 = check_content(path, recorded)
            network = self._loaded.pop((sha256, *place), None)
            if network is None:
                with torch.inference_mode(False):  # it outlives the caller's mode
                    network = pointwise(self._load(path, place[0]).to(*place))
                check_content(path, sha256)  # that it was not replaced meanwhile
            self._loaded[sha256, *place] = network
            while len(self._loaded) > 2:
                del self._loaded[next(iter(self._loaded))]
            return network


def _load_detector(path: Path, device: torch.device) -> "NucleusDetector":
    # the workers that plan start in half the time without it
    from pipeline.model.detector import load_weights
    from pipeline.model.gpu_layers import use_gpu_layers
    from pipeline.model.prepare import fold, slice_widest, widen_kernels

    model = fold(load_weights(path))
    return slice_widest(widen_kernels(model)) if device.type == "cpu" else use_gpu_layers(model, device)


def _load_stain_network(path: Path, _device: torch.device) -> ClusterNet:
    return dcgmm.load(path)


_detectors = _Networks(_load_detector)
_stain_networks = _Networks(_load_stain_network)
