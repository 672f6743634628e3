// QuPath, Automate > Script editor: import the nuclei of every slide of the project, then run for the project.
// Set RESULTS to the folder that was given to nightslide run as --out.
import groovy.io.FileType

def RESULTS = new File('/path/to/results')

def name = GeneralTools.stripExtension(getCurrentImageData().getServer().getMetadata().getName())
def matches = []
RESULTS.eachFileRecurse(FileType.FILES) { file ->
    if (file.name == 'nuclei.geojson.zip' && file.parentFile.name == name)
        matches << file
}
if (matches.size() != 1) {
    println "${name}: ${matches.size()} results found under ${RESULTS}, need one"
    return
}
importObjectsFromFile(matches[0].absolutePath)
fireHierarchyUpdate()
println "${name}: ${getDetectionObjects().size()} nuclei"
