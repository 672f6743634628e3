package qupath.lib.projects;

import java.io.File;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.ObjectOutputStream;
import java.io.Serializable;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import qupath.lib.images.servers.ImageServer;

public class Project<T> implements Serializable {
    private final File file;
    private final List<ProjectImageEntry<T>> images = new ArrayList<>();

    Project(File file) { this.file = file; }

    public Path getPath() { return file.toPath(); }
    public List<ProjectImageEntry<T>> getImageList() { return Collections.unmodifiableList(images); }

    public ProjectImageEntry<T> addImage(ImageServer<T> builder) {
        var entry = new ProjectImageEntry<T>(builder, new File(file.getParentFile(), images.size() + 1 + ".qpdata"));
        images.add(entry);
        return entry;
    }

    public void syncChanges() throws IOException {
        try (var stream = new ObjectOutputStream(new FileOutputStream(file))) {
            stream.writeObject(this);
        }
    }
}
