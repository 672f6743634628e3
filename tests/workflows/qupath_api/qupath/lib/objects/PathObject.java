package qupath.lib.objects;

import java.io.Serializable;
import java.util.ArrayList;
import java.util.Collection;
import java.util.List;
import java.util.UUID;

public class PathObject implements Serializable {
    public final String type, classification;
    public final List<PathObject> children = new ArrayList<>();
    private final UUID id;
    private boolean locked;

    public PathObject(UUID id, String type, String classification) {
        this.id = id;
        this.type = type;
        this.classification = classification;
    }

    public UUID getID() { return id; }
    public boolean isLocked() { return locked; }
    public void setLocked(boolean locked) { this.locked = locked; }
    public void addChildObjects(Collection<? extends PathObject> objects) { children.addAll(objects); }
}
