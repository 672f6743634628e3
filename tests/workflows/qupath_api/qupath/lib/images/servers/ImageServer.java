package qupath.lib.images.servers;

import java.io.File;
import java.io.IOException;
import java.io.Serializable;
import java.net.URI;
import java.util.Collection;
import java.util.List;
import javax.imageio.ImageIO;

/** Also its own builder, metadata and calibration. */
public class ImageServer<T> implements Serializable {
    private final URI uri;
    private final int width, height;
    private String name;
    public double[] umPerPx;  // x y

    public ImageServer(URI uri) throws IOException {
        var image = ImageIO.read(new File(uri));
        this.uri = uri;
        this.width = image.getWidth();
        this.height = image.getHeight();
        this.name = new File(uri).getName();
    }

    public Collection<URI> getURIs() { return List.of(uri); }
    public int getWidth() { return width; }
    public int getHeight() { return height; }
    public ImageServer<T> getMetadata() { return this; }
    public ImageServer<T> getBuilder() { return this; }
    public ImageServer<T> getPixelCalibration() { return this; }
    public boolean hasPixelSizeMicrons() { return umPerPx != null; }
    public String getName() { return name; }
    public void setName(String name) { this.name = name; }
    public void close() { }
}
