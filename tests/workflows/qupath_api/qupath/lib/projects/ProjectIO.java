package qupath.lib.projects;

import java.io.File;
import java.io.FileInputStream;
import java.io.IOException;
import java.io.ObjectInputStream;

public class ProjectIO {
    @SuppressWarnings("unchecked")
    public static <T> Project<T> loadProject(File file, Class<T> cls) throws IOException, ClassNotFoundException {
        try (var stream = new ObjectInputStream(new FileInputStream(file))) {
            return (Project<T>) stream.readObject();
        }
    }
}
