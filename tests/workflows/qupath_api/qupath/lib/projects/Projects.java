package qupath.lib.projects;

import java.io.File;

public class Projects {
    public static <T> Project<T> createProject(File file, Class<T> cls) { return new Project<>(file); }
}
