// A QuPath project of all finished slides of a run, with their nuclei, tissue, artefacts and stains.
//
//     QuPath script project.groovy --args RESULTS --args SLIDES --args PROJECT.qpproj
//
// RESULTS is the --out folder of the run. SLIDES, if given, is searched for slides that are no longer where they were.
// Without PROJECT.qpproj it is RESULTS/qupath/project.qpproj. A project is made, or extended by what it lacks.
// A second run changes nothing. import.groovy must lie beside this file.
import groovy.io.FileType
import java.awt.image.BufferedImage
import qupath.lib.images.ImageData
import qupath.lib.images.servers.ImageServers
import qupath.lib.projects.ProjectIO
import qupath.lib.projects.Projects

def (projects, folders) = (binding.variables['args'] as List ?: []).split { it.endsWith('.qpproj') }
if (!folders)
    throw new IllegalArgumentException('no results are given: add --args RESULTS, the --out folder of nightslide run')
def results = new File(folders[0] as String)
def moved = folders.size() > 1 ? new File(folders[1] as String) : null
def file = projects ? new File(projects[0] as String) : new File(results, 'qupath/project.qpproj')
def importer = new GroovyShell(getClass().classLoader).parse(
    new File(new File(getProperty('qupath.script.file') as String).parentFile, 'import.groovy'))

file.absoluteFile.parentFile.mkdirs()
def project = file.exists() ? ProjectIO.loadProject(file, BufferedImage) : Projects.createProject(file, BufferedImage)
def failed = 0
importer.findSlides(results).sort { it.folder.path }.each { slide ->
    def name = imageName(results, slide)
    try {
        println "${name}: ${addSlide(project, importer, slide, imageFile(importer, slide, moved), name)}"
    } catch (Exception error) {
        failed++
        println "${name}: FAILED: ${error.message}"
    }
}
println "${file}: ${project.getImageList().size()} images"
if (failed)
    throw new IllegalStateException("${failed} slides failed; each is named above")

/** Where a slide is now: where it was, else the file of its name below a folder whose path is the most similar. */
File imageFile(def importer, Map slide, File moved) {
    def file = new File(slide.source_path as String)
    if (file.exists())
        return file
    def named = []
    moved?.eachFileRecurse(FileType.FILES) { if (it.name == slide.source) named << it }
    def fitting = importer.mostSimilar(named, slide.source_path) { it.path }
    if (fitting.size() == 1)
        return fitting[0]
    throw new IllegalStateException("${file} does not exist, and ${fitting.size()} files of its name are in SLIDES: need one")
}

/** That of its results with its file's suffix, as that of its regions may have: a/x.svs. */
String imageName(File results, Map slide) {
    def name = results.toPath().relativize(slide.folder.toPath()).toString().replace('\\', '/')
    def suffix = (slide.source =~ /(\.ome)?\.[^.]*$/).with { it.find() ? it.group() : '' }
    return name.endsWith(suffix) ? name : name + suffix
}

/** The results are read and checked before the image is added, and saved before the project is. */
String addSlide(def project, def importer, Map slide, File image, String name) {
    def entry = project.getImageList().find { known ->
        known.getURIs().any { it.scheme == 'file' && importer.sameFile(new File(it.path), image.path) }
    }
    def imageData = entry != null ? entry.readImageData() : new ImageData<>(ImageServers.buildServer(image.toURI()))
    def server = imageData.getServer()
    try {
        def done = importer.importSlide(imageData, slide)
        if (entry == null) {
            entry = project.addImage(server.getBuilder())
            entry.setImageName(name)
        }
        if (!done.startsWith('nothing to do')) {
            entry.saveImageData(imageData)
            project.syncChanges()
        }
        return done
    } finally {
        server.close()
    }
}
