"""Annotated images: found and read in every form, cut into training crops, augmented."""
