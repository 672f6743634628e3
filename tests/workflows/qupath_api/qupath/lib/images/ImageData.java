package qupath.lib.images;

import java.io.Serializable;
import java.util.HashMap;
import java.util.Map;
import qupath.lib.color.ColorDeconvolutionStains;
import qupath.lib.images.servers.ImageServer;
import qupath.lib.objects.hierarchy.PathObjectHierarchy;

public class ImageData<T> implements Serializable {
    public enum ImageType { BRIGHTFIELD_H_E, BRIGHTFIELD_OTHER, UNSET }

    private final ImageServer<T> server;
    private final PathObjectHierarchy hierarchy = new PathObjectHierarchy();
    private final Map<String, Object> properties = new HashMap<>();
    private ImageType type = ImageType.UNSET;
    private ColorDeconvolutionStains stains;

    public ImageData(ImageServer<T> server) { this.server = server; }

    public ImageServer<T> getServer() { return server; }
    public PathObjectHierarchy getHierarchy() { return hierarchy; }
    public Object getProperty(String key) { return properties.get(key); }
    public Object setProperty(String key, Object value) { return properties.put(key, value); }
    public ImageType getImageType() { return type; }
    public void setImageType(ImageType type) { this.type = type; }
    public ColorDeconvolutionStains getColorDeconvolutionStains() { return stains; }
    public void setColorDeconvolutionStains(ColorDeconvolutionStains stains) { this.stains = stains; }
}
