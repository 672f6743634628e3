"""Patches in, instances out: stain normalisation, the detector, test-time augmentation. Knows no slide.

`inference` is where it starts: it normalises a batch of patches, detects in every view, fuses the views, and hands the
instances to the host. `load` keeps the networks, which `prepare` makes faster; `deterministic` holds what makes a CPU
give the same bits on any number of threads.
"""
