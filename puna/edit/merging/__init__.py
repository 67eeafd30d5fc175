"""Models merged out of several: deltas over a base, methods, mergekit's files, instruction residuals."""
