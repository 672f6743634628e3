"""report.html: what became of the slides of a run, on one page that needs nothing else."""
