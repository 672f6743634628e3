// Stands for `QuPath script FILE [-p PROJECT -s] --args ...`: script.groovy FILE PROJECT ARGS...; PROJECT may be "-".
// At last it prints the project, whose name is in the environment, as a line of JSON.
import groovy.json.JsonOutput
import java.awt.image.BufferedImage
import qupath.lib.projects.ProjectIO
import qupath.lib.scripting.QP

def script = new File(args[0])
def project = args[1] == '-' ? null : ProjectIO.loadProject(new File(args[1]), BufferedImage)
def run = {
    def binding = new Binding(args: args.drop(2), 'qupath.script.file': script.absolutePath)
    new GroovyShell(getClass().classLoader, binding).evaluate(script)
}
def failed = 0
try {
    if (project == null)
        run()
    for (entry in project?.getImageList()) {
        QP.project = project
        QP.imageData = entry.readImageData()
        try {
            run()
            entry.saveImageData(QP.imageData)
        } catch (Exception error) {
            failed++
            println "ERROR ${entry.imageName}: ${error.message}"
        }
    }
} catch (Exception error) {
    failed++
    println "ERROR ${error.message}"
}
def saved = new File(System.getenv('QUPATH_PROJECT'))
def describe = { object -> [type: object.type, name: object.classification, locked: object.locked, id: object.ID.toString(),
    children: object.children.collect { it.ID.toString() }] }
println 'PROJECT ' + JsonOutput.toJson(!saved.exists() ? null : ProjectIO.loadProject(saved, BufferedImage).imageList.collect {
    def data = it.readImageData()
    [name: it.imageName, uri: it.getURIs()[0].toString(), type: data.imageType.toString(),
        stains: data.colorDeconvolutionStains?.toString(), um_per_px: data.server.umPerPx, objects: data.hierarchy.top.collect(describe)]
})
System.exit(failed ? 1 : 0)
