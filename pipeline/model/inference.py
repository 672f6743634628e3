"""Patches -> instances: stain normalisation, every view, fusion, batch by batch on the device."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import roi_align

from pipeline.config import Settings, side_step
from pipeline.model import fuse, instances, load, stain, views
from pipeline.model.allocator import return_freed_memory
from pipeline.model.detector import Limits
from pipeline.model.device import choose_device, compute, start_download
from pipeline.model.fitted_stain import UNCHANGED, Normalisation
from pipeline.model.instances import HostInstances, Instances, Patches, Result
from pipeline.model.roi_align import flatten_boxes
from pipeline.model.split import join, quarters
from slides.geometry import Size

Sides = tuple[int, int]
"Height and width, patch px."

_GLASS = 255
_DRAWN_PX = 512  # side of the drawing of nuclei that fills the patches of `prepare_device`


def detect_patches(patches: Patches, normalisation: Normalisation, settings: Settings) -> Iterator[Result]:
    """The instances of each of the patches uint8 (h, w, 3), as numpy arrays, in the order of the patches.

    What the device does is done, or has at least been given to it, while the iterator is advanced. For a GPU this call
    itself copies the patches into pinned memory, and the results that are called in the end wait for the instances; so
    meanwhile it may compute for another thread.
    normalisation: of the slide that the patches were cut from
    A batch is made of patches of one size, which need not be neighbours in `patches`; for a GPU all patches are first
    filled up with glass to a few sizes (`_usual_sides`). Where the device has no memory for a batch, this process makes
    its batches smaller from then on. A patch for which there is no memory even when it is alone is detected in quarters
    (`split`); where there is none for the smallest quarters either, the patch has no instances and is marked `lost`.
    Law: the instances of a patch that fits depend neither on the other patches nor on whether those fit.
    """
    on_gpu = choose_device(settings.detector.device).type == "cuda"
    alike: dict[Sides, list[int]] = {}
    for number, patch in enumerate(patches):
        alike.setdefault(_usual_sides(_sides(patch), settings) if on_gpu else _sides(patch), []).append(number)
    groups = [_Group(sides, numbers, [patches[n] for n in numbers], on_gpu) for sides, numbers in alike.items()]
    return _detect_groups(groups, normalisation, settings)


def prepare_device(settings: Settings) -> None:
    """Load the detector; on a GPU also detect in a whole batch, of drawn nuclei.

    So CUDA's libraries are loaded, kernels compiled, and the convolutions of the size that most batches have planned.
    """
    if load.detector(settings.detector).device.type != "cuda":
        return
    from slides.phantom import draw

    drawn, tile = draw(Size(_DRAWN_PX, _DRAWN_PX), 0).image, settings.tiling.tile
    patch = np.tile(drawn, (-(-tile // _DRAWN_PX), -(-tile // _DRAWN_PX), 1))[:tile, :tile]
    queue = detect_patches([patch] * _batch_size(settings), UNCHANGED, settings)
    results: list[Result] = compute(settings.detector.device, lambda: list(queue))
    for result in results:
        result()


class _Group:
    """Patches of a call that have one size, some of them after glass was appended."""

    def __init__(self, sides: Sides, numbers: Sequence[int], patches: Patches, on_gpu: bool) -> None:
        """numbers: of the patches, in the order of the call."""
        self.sides, self.numbers, self.patches = sides, numbers, patches
        self._stacked = _stack(patches, sides, pinned=True) if on_gpu else None

    def batch(self, first: int, most: int) -> Tensor:
        """Some of its patches, from the one at this place on: uint8 (B, H, W, 3)."""
        some = slice(first, first + most)
        return _stack(self.patches[some], self.sides) if self._stacked is None else self._stacked[some]


def _stack(patches: Patches, sides: Sides, *, pinned: bool = False) -> Tensor:
    """Patches in one tensor uint8 (B, H, W, 3) of these sides, with glass on the right and below.

    pinned: in memory that a GPU copies from while the host goes on; from elsewhere the host waits.
    """
    stacked = torch.empty((len(patches), *sides, 3), dtype=torch.uint8, pin_memory=pinned)
    pixels = stacked.numpy()
    for place, patch in zip(pixels, patches, strict=True):
        height, width = _sides(patch)
        place[:height, :width], place[height:], place[:height, width:] = patch, _GLASS, _GLASS
    return stacked


def _detect_groups(groups: Sequence[_Group], normalisation: Normalisation, settings: Settings) -> Iterator[Result]:
    """The instances of the patches of all groups, in the order of their numbers; as `detect_patches`."""
    places = {number: (group, place) for group in groups for place, number in enumerate(group.numbers)}
    done: dict[int, Result] = {}
    for number in sorted(places):
        group, first = places[number]
        while number not in done:
            batch = group.batch(first, _batch_size(settings))
            detected = _attempt(batch, normalisation, settings)
            if detected is None and len(batch) > 1:
                _batch_that_fits[settings] = len(batch) // 2
                continue
            detected = detected or _alone(group.patches[first], group.sides, normalisation, settings)
            for place in range(len(batch)):
                own = _sides(group.patches[first + place])
                done[group.numbers[first + place]] = functools.partial(_result, detected, place, own, group.sides)
        yield done.pop(number)
        if choose_device(settings.detector.device).type == "cpu":
            return_freed_memory()


def _result(detected: "_Detected", place: int, own: Sides, filled: Sides) -> HostInstances:
    """The instances of a batch's patch at this place. own, filled: its sides before it was filled up, and after."""
    found = _as_numpy(detected()[place])
    return found if own == filled else _cropped(found, own)


def _sides(patch: NDArray[np.uint8]) -> Sides:
    return patch.shape[0], patch.shape[1]


def _batch_size(settings: Settings) -> int:
    on_gpu = load.detector(settings.detector).device.type == "cuda"
    wanted = settings.detector.batch or (settings.tiling.block**2 if on_gpu else 1)
    return _batch_that_fits.get(settings, wanted)


_batch_that_fits: dict[Settings, int] = {}  # patches per inference, where more of them were too many for this process


# ----------------------------------------------------------------------------------- few sizes, for a GPU


def _usual_sides(sides: Sides, settings: Settings) -> Sides:
    """Height and width that a patch is filled up to with glass: each that of half a tile or a whole one.

    cuDNN plans every convolution anew for each size of its input, which takes the network two seconds on an H200, and
    patches that are trimmed to their tissue have a size each. A side that is larger than a tile stays as it is.
    """
    step = side_step(load.detector(settings.detector).model.architecture.upscale)
    half, whole = -(-settings.tiling.tile // (2 * step)) * step, settings.tiling.tile
    height, width = (next((usual for usual in (half, whole) if side <= usual), side) for side in sides)
    return height, width


def _usual_number(count: int, settings: Settings) -> int:
    """The number of patches that a batch of `count` patches is filled up to, with patches of glass.

    On a GPU it is 1, 2, 4, 8, ... or the size of the largest batch, because the GPU plans every convolution anew for
    each number of patches. On a CPU it is `count`: nothing is added.
    """
    if choose_device(settings.detector.device).type == "cpu":
        return count
    return min(1 << (count - 1).bit_length(), max(count, _batch_size(settings)))


def _cropped(patch: HostInstances, size: Sides) -> HostInstances:
    """The instances of a patch that was filled up with glass, without the part of them that lies in the glass.

    size: height and width of the patch before it was filled up. Instances beyond it are left out; the box of one that
    crosses its edge ends there, and the rest of the mask is stretched over the M x M grid of the smaller box.
    """
    edge = np.array(size[::-1], np.float32)
    patch = instances.select(patch, np.flatnonzero((patch.boxes[:, :2] < edge).all(1)))
    crossing = np.flatnonzero((patch.boxes[:, 2:] > edge).any(1))
    if len(crossing) == 0:
        return patch
    boxes, masks = torch.from_numpy(patch.boxes[crossing]), torch.from_numpy(patch.mask_probs[crossing]).float()
    low, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    inside = torch.minimum(boxes[:, 2:], torch.from_numpy(edge)) - low
    centres = (torch.arange(masks.shape[-1]) + 0.5) / masks.shape[-1]  # of the grid's pixels
    x, y = (2 * centres * (inside / sides)[:, i : i + 1] - 1 for i in (0, 1))  # (N, M), -1..1 of the whole box
    grid = torch.stack([x[:, None].expand(-1, masks.shape[-1], -1), y[..., None].expand(-1, -1, masks.shape[-1])], -1)
    remaining = F.grid_sample(masks[:, None], grid, padding_mode="border", align_corners=False)[:, 0].round()
    cut = patch._replace(boxes=patch.boxes.copy(), mask_probs=patch.mask_probs.copy())
    cut.boxes[crossing, 2:], cut.mask_probs[crossing] = (low + inside).numpy(), remaining.byte().numpy()
    return cut


# ------------------------------------------------------------------------------------------------- a batch


_Detected = Callable[[], list[Instances[Tensor]]]
"Waits for the instances of a batch's patches, and gives them, on the host."


def _detect(batch: Tensor, normalisation: Normalisation, settings: Settings) -> _Detected:
    """Normalise a batch uint8 (B, H, W, 3), detect in every view, fuse."""
    running = load.detector(settings.detector)
    limits = Limits.of_patch(settings.detector, (batch.shape[1], batch.shape[2]), settings.tiling.mpp)
    normaliser = load.normaliser(normalisation, settings.stain, running.device)
    with torch.inference_mode():
        pixels = batch.to(running.device, non_blocking=True)
        if missing := _usual_number(len(batch), settings) - len(batch):
            pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing), value=_GLASS)
        raw = pixels.permute(0, 3, 1, 2) / 255  # float32 (B, 3, H, W)
        images = normaliser(raw)
        chosen = views.choose_views(settings.detector.views)
        with running.autocast():
            detected = fuse.infer(running.model, images, chosen, limits, settings.tiling.margin)
        return _download(detected[: len(batch)], raw[: len(batch)])


def _stain_density(images: Tensor, boxes: Sequence[Tensor], masks: Tensor) -> Tensor:
    """`instances.STATISTICS` of haematoxylin and eosin where a mask exceeds a half: float32 (N, 2, 5), on the device.

    images: float32 (B, 3, H, W), before normalisation; boxes: of each image, (n, 4); masks: of all, (N, M, M).
    The deviation of a single pixel is NaN, as in QuPath.
    """
    rois, image = flatten_boxes(boxes)
    rois = torch.cat([image[:, None], rois], 1)  # as torchvision takes them
    # at the middle of each of the mask's pixels; without `aligned` half a pixel right of it and below
    density = roi_align(stain.he_density(images), rois, masks.shape[-1], sampling_ratio=1, aligned=True)  # (N, 2, M, M)
    inside = (masks > 0.5)[:, None]
    count = inside.sum((2, 3)).clamp(min=1)  # (N, 1)
    mean = (density * inside).sum((2, 3)) / count  # (N, 2)
    squares = ((density - mean[..., None, None]) * inside).square().sum((2, 3))
    ordered = density.masked_fill(~inside, torch.inf).flatten(2).sort(2).values  # (N, 2, M * M), those outside last
    last = count - 1
    places = torch.stack([last // 2, count // 2, last], 2).expand(-1, 2, -1)
    lower, upper, greatest = ordered.gather(2, places).unbind(2)
    return torch.stack([mean, (lower + upper) / 2, ordered[..., 0], greatest, (squares / last).sqrt()], 2)


def _download(batch: Sequence[Instances[Tensor]], images: Tensor) -> _Detected:
    """A batch's instances on the host, with the stain density that each has in `images`, in one copy.

    The columns are joined to one table of bytes, which is copied once and taken apart again. The host does not wait for
    it here, so that the next batch can be given to a GPU that is still at the masks of this one.
    From here on masks are uint8: they have 256 levels.
    """
    whole = instances.concat(batch)
    density = _stain_density(images, [patch.boxes for patch in batch], whole.mask_probs)
    levels = (whole.mask_probs * 255).round().byte()
    whole = whole._replace(stain_density=density, mask_probs=levels)
    columns = [getattr(whole, name) for name in instances.columns(Instances)]
    flat = [column.flatten(1) if column.dim() > 1 else column[:, None] for column in columns]
    table = start_download(torch.cat([values.contiguous().view(torch.uint8) for values in flat], 1))
    # what is kept until the copy is there holds nothing of the device's memory
    widths = [values.shape[1] * values.itemsize for values in flat]
    kinds = [(column.dtype, column.shape) for column in columns]
    counts, flags = [len(patch.boxes) for patch in batch], [patch[len(columns) :] for patch in batch]

    @functools.cache
    def detected() -> list[Instances[Tensor]]:
        parts = table().split(widths, 1)
        host = [
            values.clone(memory_format=torch.contiguous_format).view(dtype).view(shape).split(counts)
            for (dtype, shape), values in zip(kinds, parts, strict=True)
        ]
        return [Instances(*values, *of_patch) for *values, of_patch in zip(*host, flags, strict=True)]

    return detected


def _as_numpy(patch: Instances[Tensor]) -> HostInstances:
    """The same memory, as numpy arrays; the tensors are on the host."""
    arrays: Any = patch._replace(**{name: getattr(patch, name).numpy() for name in instances.columns(Instances)})
    host: HostInstances = arrays
    return host


# ------------------------------------------------------------------------------------------- out of memory


_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of CUDA, the processor, CUDA's libraries
# Of cuDNN where it has no kernel for a convolution: for want of memory, or because there is none for this GPU.
_NO_KERNEL = "unable to find an engine"
_LEAST_PX = 256  # longer side of a quarter: smaller ones are mostly margin


def _attempt(batch: Tensor, normalisation: Normalisation, settings: Settings) -> _Detected | None:
    """The instances of a batch, or None where there is no memory for it; the memory of the attempt is then free again.

    Every other error is raised. One that may be a shortage counts as such for several patches: a single one shows it.
    """
    try:
        return _detect(batch, normalisation, settings)
    except (MemoryError, RuntimeError) as error:
        of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        said = (*_OF_MEMORY, _NO_KERNEL) if len(batch) > 1 else _OF_MEMORY
        if not of_memory and not any(words in str(error) for words in said):
            raise
    # not in the except block: until it ends, the exception holds the tensors of its frames
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _alone(patch: NDArray[np.uint8], filled: Sides, normalisation: Normalisation, settings: Settings) -> _Detected:
    """The instances of a patch for which there is no memory in the sides to which it was filled up.

    As it is; else in quarters; else it has none, and is marked `lost`.
    """
    if _sides(patch) != filled and (detected := _attempt(_stack([patch], _sides(patch)), normalisation, settings)):
        return detected
    found = _in_quarters(patch, normalisation, settings) or _lost(settings)
    return lambda: [found]


def _in_quarters(
    patch: NDArray[np.uint8], normalisation: Normalisation, settings: Settings
) -> Instances[Tensor] | None:
    """The instances of a patch (H, W, 3) that is detected in quarters, for want of memory for the whole.

    A quarter that is too large as well is divided in the same way. None where even the smallest quarters need more
    memory than there is. The caller tries the next patch as a whole again: it may hold fewer nuclei, and a whole patch
    gives better results.
    """
    step = side_step(load.detector(settings.detector).model.architecture.upscale)
    parts = quarters(patch.shape[:2], settings.tiling.margin, step)
    if not parts or max(parts[0].read.size) < _LEAST_PX:
        return None
    detected = []
    for part in parts:
        piece = patch[part.window]
        whole = _attempt(_stack([piece], _sides(piece)), normalisation, settings)
        rows = whole()[0] if whole else _in_quarters(piece, normalisation, settings)
        if rows is None:
            return None
        detected.append(rows)
    return join(parts, detected, settings.detector.nms)._replace(split=True)


def _lost(settings: Settings) -> Instances[Tensor]:
    """The result of a patch that could not be processed: no instances."""
    none = instances.empty(load.detector(settings.detector).model.architecture.mask_size)
    columns: Any = {name: torch.from_numpy(getattr(none, name)) for name in instances.columns(Instances)}
    return Instances(**columns, lost=True)
