// The results of nightslide, into the images of a QuPath project: nuclei beneath the tissue's outline, artefacts; of an
// image without a type, H&E with its stains; of one without a scale, that of the run.
//
//     QuPath script import.groovy -p project.qpproj -s --args RESULTS
//
// or in QuPath's script editor: Run > Run for project. RESULTS is the --out folder of a run, or the folder of one slide
// in it; without it, the folders around the project are searched. A second run changes nothing.
import com.google.gson.Gson
import groovy.io.FileType
import java.util.zip.ZipFile
import qupath.lib.color.ColorDeconvolutionStains
import qupath.lib.images.ImageData
import qupath.lib.io.PathIO
import qupath.lib.scripting.QP

def imageData = QP.getCurrentImageData()
if (imageData == null)
    throw new IllegalStateException('no image is open: run for a project, or give -p project.qpproj -s')
def server = imageData.getServer()
def slide = findSlide(findSlides(resultsFolder(binding.variables['args'])), server)
println "${slide.source}: ${importSlide(imageData, slide)}"

/** The folder that is given as an argument, else the one around the project that holds a run. */
File resultsFolder(def arguments) {
    if (arguments)
        return new File(arguments[0] as String)
    def project = QP.getProject()
    for (def folder = project?.getPath()?.toFile()?.getParentFile(); folder != null; folder = folder.getParentFile())
        if (new File(folder, 'run.json').exists())
            return folder
    throw new IllegalArgumentException('no results are given: add --args RESULTS, the --out folder of nightslide run')
}

/** What slide.json says of every finished slide in a folder, and the slide's own folder. */
List<Map> findSlides(File results) {
    def slides = []
    results.eachFileRecurse(FileType.FILES) { file ->
        if (file.name == 'slide.json')
            slides << new Gson().fromJson(file.getText('UTF-8'), Map) + [folder: file.parentFile]
    }
    return slides
}

/** The slide that an image is of: the same file, else one of the same name, whose folders have the most similar names. */
Map findSlide(List<Map> slides, def server) {
    def files = server.getURIs().findAll { it.scheme == 'file' }.collect { new File(it.path) }
    def name = server.getMetadata().getName()
    def fitting = slides.findAll { slide -> files.any { sameFile(it, slide.source_path) } }
    if (!fitting) {
        def named = files ? slides.findAll { slide -> files.any { it.name == slide.source } } :
            slides.findAll { name == it.source || name.startsWith(it.source + ' - ') }  // as Bio-Formats names a series
        fitting = mostSimilar(named, files ? files[0].path : name) { it.source_path }
    }
    if (fitting.size() == 1)
        return fitting[0]
    def found = fitting.collect { "\n    ${it.folder}, of ${it.source_path}" }.join('')
    throw new IllegalArgumentException("${files ? files[0] : name}: ${fitting.size()} results, need one: give the " +
        "folder of its own results as RESULTS${found}")
}

boolean sameFile(File file, String path) {
    return file.canonicalFile == new File(path).canonicalFile
}

/** Those whose path has the most names at its end in common with another path, whichever system wrote it. */
List mostSimilar(Collection candidates, String path, Closure pathOf) {
    def names = { it.split('[/\\\\]').toList().reverse() }
    def common = { [names(path), names(pathOf(it))].transpose().takeWhile { a, b -> a == b }.size() }
    def most = candidates.collect(common).max()
    return candidates.findAll { common(it) == most }
}

/** Add a slide's results to its image, all or nothing. Returns what was done. */
String importSlide(def imageData, Map slide) {
    def exported = slide.files['nuclei.geojson.zip']
    if (exported == null)
        throw new IllegalStateException("${slide.folder} has no nuclei.geojson.zip: run nightslide export RESULTS")
    def hierarchy = imageData.getHierarchy()
    def present = hierarchy.getDetectionObjects()
    def total = slide.record.work.counts.nuclei as long
    def former = imageData.getProperty('nightslide')  // the checksum of what was imported
    if (former == exported.sha256 && (present || total == 0))
        return "nothing to do, has its ${present.size()} nuclei"
    checkSize(slide, imageData.getServer())
    def nuclei = readNuclei(slide)
    def ids = nuclei.collect { it.getID() } as Set
    def known = present.count { it.getID() in ids }
    if (present && known == nuclei.size() && former == null) {  // they were dragged onto the image
        imageData.setProperty('nightslide', exported.sha256)
        return "has its ${known} nuclei already"
    }
    if (present && (known || former != null))
        throw new IllegalStateException("${slide.source} has nuclei of another result: delete its detections, and run again")
    setStains(imageData, slide)
    setScale(imageData, slide)
    addBeneathTissue(hierarchy, nuclei, readAnnotations(slide, 'tissue.geojson'), readAnnotations(slide, 'artefacts.geojson'))
    imageData.setProperty('nightslide', exported.sha256)
    def left = total - nuclei.size()
    return "${nuclei.size()} nuclei" + (left ? ", without ${left} that are too small or outside the image" : '')
}

/** Whether the coordinates are those of QuPath's image: it crops slides with bounds, and the export does, unless told not to. */
void checkSize(Map slide, def server) {
    def (x0, y0, x1, y1) = slide.bounds
    def size = slide.files['nuclei.geojson.zip'].options.crop ? [x1 - x0, y1 - y0] : slide.size
    if ([server.getWidth() as int, server.getHeight() as int] != size.collect { it as int })
        throw new IllegalStateException("${slide.source} has ${server.getWidth()} x ${server.getHeight()} px in QuPath, " +
            "the nuclei are in an image of ${size[0] as int} x ${size[1] as int} px: run nightslide export RESULTS with " +
            '--no-crop, or without it; of a file of several images, open the slide itself')
}

/** All nuclei of nuclei.geojson.zip. Fails where QuPath reads fewer than a file holds, or the zip is not that of slide.json. */
List readNuclei(Map slide) {
    def zip = new File(slide.folder, 'nuclei.geojson.zip')
    if (zip.length() != (slide.files[zip.name].bytes as long))
        throw new IllegalStateException("${zip} is not as it was written: run nightslide export RESULTS")
    def nuclei = []
    new ZipFile(zip).withCloseable { archive ->
        archive.entries().each { shard ->
            def bytes = archive.getInputStream(shard).withCloseable { it.bytes }
            def written = 0
            new ByteArrayInputStream(bytes).eachLine('UTF-8') { if (it.startsWith('{"type":"Feature",')) written++ }
            def read = PathIO.readObjectsFromGeoJSON(new ByteArrayInputStream(bytes))
            if (read.size() != written)
                throw new IllegalStateException("${zip}: QuPath reads ${read.size()} of ${written} nuclei in ${shard.name}")
            nuclei.addAll(read)
        }
    }
    return nuclei
}

/** The annotations of a file beside slide.json; none where there is no such file. */
List readAnnotations(Map slide, String name) {
    def file = new File(slide.folder, name)
    return file.exists() ? file.withInputStream { PathIO.readObjectsFromGeoJSON(it) } : []
}

/** Nuclei become children of the tissue where it is one annotation, which is locked; annotations that are there stay. */
void addBeneathTissue(def hierarchy, List nuclei, List tissue, List artefacts) {
    def present = hierarchy.getAnnotationObjects().collectEntries { [it.getID(), it] }
    def outlines = tissue.collect { present[it.getID()] ?: it }
    outlines.each { it.setLocked(true) }
    if (outlines.size() == 1)
        outlines[0].addChildObjects(nuclei)
    hierarchy.addObjects((outlines + artefacts).findAll { !present.containsKey(it.getID()) })
    if (outlines.size() != 1)
        hierarchy.addObjects(nuclei)
    hierarchy.fireHierarchyChangedEvent(this, hierarchy.getRootObject())
}

/** H&E, with the stains that were fitted to the slide (--stain macenko), else QuPath's; an image with a type keeps it. */
void setStains(def imageData, Map slide) {
    if (imageData.getImageType() != ImageData.ImageType.UNSET)
        return
    imageData.setImageType(ImageData.ImageType.BRIGHTFIELD_H_E)
    def fitted = slide.stain.numbers
    if (!fitted.haematoxylin)
        return
    def text = { numbers -> numbers.collect { String.format(Locale.US, '%.5f', it as double) }.join(' ') }
    imageData.setColorDeconvolutionStains(ColorDeconvolutionStains.parseColorDeconvolutionStainsArg(
        '{"Name" : "nightslide", ' +
        "\"Stain 1\" : \"Hematoxylin\", \"Values 1\" : \"${text(fitted.haematoxylin)}\", " +
        "\"Stain 2\" : \"Eosin\", \"Values 2\" : \"${text(fitted.eosin)}\", " +
        "\"Background\" : \" ${text(fitted.white.collect { 255 * it })}\"}"))
}

/** The scale of the nuclei's measurements (--mpp), of an image that has none: QuPath would measure in pixels beside them. */
void setScale(def imageData, Map slide) {
    if (imageData.getServer().getPixelCalibration().hasPixelSizeMicrons())
        return
    def (x, y) = slide.um_per_px
    QP.setPixelSizeMicrons(imageData, x, y, null)
}
