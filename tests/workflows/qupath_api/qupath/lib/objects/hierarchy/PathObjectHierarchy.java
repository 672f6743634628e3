package qupath.lib.objects.hierarchy;

import java.io.Serializable;
import java.util.ArrayList;
import java.util.Collection;
import java.util.List;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import qupath.lib.objects.PathObject;

public class PathObjectHierarchy implements Serializable {
    public final List<PathObject> top = new ArrayList<>();

    private static Stream<PathObject> all(Collection<PathObject> objects) {
        return objects.stream().flatMap(object -> Stream.concat(Stream.of(object), all(object.children)));
    }

    public Collection<PathObject> getAnnotationObjects() {
        return all(top).filter(object -> object.type.equals("annotation")).collect(Collectors.toList());
    }

    public Collection<PathObject> getDetectionObjects() {
        return all(top).filter(object -> !object.type.equals("annotation")).collect(Collectors.toList());
    }

    public boolean addObjects(Collection<? extends PathObject> objects) { return top.addAll(objects); }
    public PathObject getRootObject() { return null; }
    public void fireHierarchyChangedEvent(Object source, PathObject changed) { }
}
