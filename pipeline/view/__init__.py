"""A browser on the results of a run: `nightslide view`. Needs the extra `view`."""
