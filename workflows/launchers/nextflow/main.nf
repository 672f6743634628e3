#!/usr/bin/env nextflow
/* Slides with Nextflow: a process for each slide, or one for a whole archive. From the root of the repository:
 *   nextflow run workflows/launchers/nextflow --slides slides --out results -resume
 *   nextflow run workflows/launchers/nextflow --archive slides --out results --flags '--views 4 --stain macenko'
 * --slides: a folder. Each slide in it is a task of its own, on whatever executor Nextflow is set to; its results lie
 * in OUT, by the same names as those of `nightslide run`. -resume starts only what is new, changed or failed; a slide
 * that was interrupted restarts at its first tile. `nightslide report OUT` then makes the report. Not for DICOM.
 * --archive: what `nightslide run` takes: a folder, a slide, a manifest, or a URL (with --flags '--stage DIR'). One task
 * does all slides, with all that it may use of its machine, and continues after a failure at the block.
 * --flags: of `nightslide run`. A task that fails is tried twice more (nextflow.config).
 */
nextflow.enable.dsl = 2

params.slides = null
params.archive = null
params.out = 'results'
params.flags = ''
params.suffixes = 'bif,czi,mrxs,ndpi,scn,svs,svslide,tif,tiff,vms,vmu'

process SLIDE {
    tag "${slide}"
    // not what each task writes of its one slide, and the run of all
    publishDir params.out, mode: 'copy', saveAs: { file ->
        file ==~ /results\/(ledger\.csv|report\.html|logs\/.*)/ ? null : file - 'results/'
    }

    input:
    tuple env('FOLDER'), path(slide)

    output:
    path 'results/**'
    path 'results/ledger.csv', emit: ledger

    // a link to the slide itself, whose siblings lie beside it there, in the folder that gives it its name
    script:
    """
    mkdir -p "slides/\$FOLDER"
    ln -s "\$(readlink -f ${slide})" "slides/\$FOLDER"/${slide}
    nightslide run slides --follow-links --out results ${params.flags}
    """
}

process ARCHIVE {
    cache false // a finished slide is kept by nightslide, and a new one may have come

    input:
    val archive
    val out

    script:
    """
    nightslide run '${archive}' --out '${out}' ${params.flags}
    """
}

workflow {
    if (!params.slides == !params.archive) {
        error "need --slides FOLDER, for a process per slide, or --archive FOLDER, for one process"
    }
    if (params.archive) {
        def here = params.archive.contains('://') ? params.archive : file(params.archive).toAbsolutePath().toString()
        ARCHIVE(here, file(params.out).toAbsolutePath().toString())
    } else {
        def top = file(params.slides).toAbsolutePath()
        def suffixed = "(?i).*[.](${params.suffixes.replace(',', '|')})" // X.SVS, too
        def slides = channel.fromPath("${top}/**", checkIfExists: true)
            .filter { found -> found.name ==~ suffixed }
            .ifEmpty { error "no slides in ${top}: need files of ${params.suffixes}" }
        SLIDE(slides.map { slide -> tuple(top.relativize(slide.parent).toString(), slide) })
        SLIDE.out.ledger.collectFile(name: 'ledger.csv', storeDir: params.out, keepHeader: true, skip: 1)
    }
}
