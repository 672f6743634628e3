"""The nuclei of a slide: which instances of its blocks they are, and what is written of each to nuclei.parquet."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from pipeline.model.weights import detector_architecture, find_weights
from pipeline.segment import arrow, polygons, tables
from pipeline.segment.job import Job
from pipeline.segment.plan import Plan
from pipeline.segment.polygons import Polygons
from pipeline.segment.record import Counts
from pipeline.segment.regions import SlideRegions, read_regions
from pipeline.segment.seams import left_out_at_seams
from slides.artefacts import KINDS, ArtefactMap

COLOURS = (
    (40, 220, 90),
    (0, 240, 255),
    (150, 0, 30),
    (40, 70, 255),
    (240, 160, 30),
    (0, 170, 170),
    (200, 90, 150),
)
"Of the classes, in their order in the weights. The first four differ for people who cannot tell red from green, too."

_KINDS = np.array(("", *KINDS))  # the column artefact, by the numbers in an `ArtefactMap`


def write_nuclei(job: Job, plan: Plan, artefacts: ArtefactMap) -> Counts:
    """Commit nuclei.parquet, in slide px, from the instances of all blocks, and count the nuclei.

    Two passes keep memory small: first the boxes of everything, and the polygons only of what could have a
    duplicate across a seam; then block by block into the table, without what is left out. Regions are looked at last,
    so the nuclei in them do not depend on them.
    artefacts: all of the slide. Raises LeaseLost between two blocks.
    """
    classes = detector_architecture(find_weights(job.settings.detector.weights)).classes
    left_out = left_out_at_seams(job, plan)
    regions = None if job.regions is None else read_regions(job.regions, plan.bounds)
    counts = Counts(seam_duplicates=sum(map(len, left_out.values())))
    with tables.NucleiWriter(job.folder.nuclei, _provenance(job, plan, classes)) as writer:
        for block in job.while_leased(iter(plan.blocks)):
            rows = tables.read_instances(job.folder.instances(block))
            once = np.ones(rows.num_rows, bool)
            once[left_out.get(block, [])] = False
            nuclei = _nuclei(rows.filter(arrow.numbers(once)), job, plan, artefacts, regions)
            writer.write(
                nuclei.outlines,
                class_name=[classes[i] for i in arrow.values(nuclei.rows["class_index"])],
                score=arrow.values(nuclei.rows["score"]),
                votes=arrow.values(nuclei.rows["votes"]),
                class_score=arrow.values(nuclei.rows["class_score"]),
                stains=np.stack([arrow.values(nuclei.rows[name]) for name in tables.STAINS], 1),
                artefact=_KINDS[nuclei.kinds].tolist(),
            )
            counts += Counts(nuclei=nuclei.rows.num_rows, flagged_nuclei=int(np.count_nonzero(nuclei.kinds)))
        job.check_lease()
    return counts


def _provenance(job: Job, plan: Plan, classes: tuple[str, ...]) -> tables.Provenance:
    return tables.Provenance(
        slide=plan.quick_hash,
        um_per_px=(plan.scale.x, plan.scale.y),
        size=plan.size,
        bounds=plan.bounds,
        digest=job.digest,
        colours={name: COLOURS[i % len(COLOURS)] for i, name in enumerate(classes)},
    )


class _Nuclei(NamedTuple):
    """Nuclei of a block. Parallel."""

    rows: pa.Table  # of `tables.INSTANCES`
    outlines: Polygons  # slide px
    kinds: NDArray[np.uint8]  # of the artefact in which the centroid lies, as in an `ArtefactMap`; 0 for none


def _nuclei(rows: pa.Table, job: Job, plan: Plan, artefacts: ArtefactMap, regions: SlideRegions | None) -> _Nuclei:
    """The instances of a block that are reported: those in the regions, and outside of artefacts that are skipped.

    rows: of `tables.INSTANCES`, without what is left out at seams
    """
    in_work_px = tables.geometry(rows)
    outlines = shapely.transform(in_work_px, plan.frame.to_slide.apply)
    kinds = artefacts.at(polygons.centroids(in_work_px))
    reported = kinds == 0 if job.settings.tissue.artefacts == "skip" else np.ones(len(kinds), bool)
    if regions is not None:  # exactly: the plan's tissue has pixels of some micrometres
        reported &= regions.select(polygons.measure(outlines, (plan.scale.x, plan.scale.y)).centroid)
    return _Nuclei(rows.filter(arrow.numbers(reported)), outlines[reported], kinds[reported])
