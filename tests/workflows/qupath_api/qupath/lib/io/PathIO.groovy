package qupath.lib.io

import groovy.json.JsonSlurper
import qupath.lib.objects.PathObject

class PathIO {
    /** Leaves out, as older versions of QuPath do, what it cannot read: here, features without an outline. */
    static List<PathObject> readObjectsFromGeoJSON(InputStream stream) {
        def features = new JsonSlurper().parse(stream, 'UTF-8').features.findAll { it.geometry }
        return features.collect {
            new PathObject(UUID.fromString(it.id), it.properties.objectType, it.properties.classification?.name)
        }
    }
}
