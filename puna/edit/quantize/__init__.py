"""Fewer bits for weights: a grid, a rounding, a transform and a mix of bits, freely combined."""
