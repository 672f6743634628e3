package qupath.lib.color;

import java.io.Serializable;

public class ColorDeconvolutionStains implements Serializable {
    private final String text;

    private ColorDeconvolutionStains(String text) { this.text = text; }

    public static ColorDeconvolutionStains parseColorDeconvolutionStainsArg(String text) {
        return new ColorDeconvolutionStains(text);
    }

    @Override public String toString() { return text; }
}
