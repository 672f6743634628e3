package qupath.lib.projects;

import java.io.File;
import java.io.FileInputStream;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.ObjectInputStream;
import java.io.ObjectOutputStream;
import java.io.Serializable;
import java.net.URI;
import java.util.Collection;
import qupath.lib.images.ImageData;
import qupath.lib.images.servers.ImageServer;

public class ProjectImageEntry<T> implements Serializable {
    private final ImageServer<T> builder;
    private final File data;
    private String name = "Image null";

    ProjectImageEntry(ImageServer<T> builder, File data) {
        this.builder = builder;
        this.data = data;
    }

    public Collection<URI> getURIs() { return builder.getURIs(); }
    public String getImageName() { return name; }
    public void setImageName(String name) { this.name = name; }

    @SuppressWarnings("unchecked")
    public ImageData<T> readImageData() throws IOException, ClassNotFoundException {
        if (!data.exists())
            return new ImageData<>(builder);
        try (var stream = new ObjectInputStream(new FileInputStream(data))) {
            return (ImageData<T>) stream.readObject();
        }
    }

    public void saveImageData(ImageData<T> imageData) throws IOException {
        try (var stream = new ObjectOutputStream(new FileOutputStream(data))) {
            stream.writeObject(imageData);
        }
    }
}
