package qupath.lib.scripting;

import java.awt.image.BufferedImage;
import qupath.lib.images.ImageData;
import qupath.lib.projects.Project;

public class QP {
    public static Project<BufferedImage> project;
    public static ImageData<BufferedImage> imageData;

    public static Project<BufferedImage> getProject() { return project; }
    public static ImageData<BufferedImage> getCurrentImageData() { return imageData; }
    public static boolean setPixelSizeMicrons(ImageData<?> imageData, Number width, Number height, Number zSpacing) {
        imageData.getServer().umPerPx = new double[] {width.doubleValue(), height.doubleValue()};
        return true;
    }
}
