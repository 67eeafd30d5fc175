"""The decoder as data: spec, blocks, caches, adapters, checkpoints. Knows no recipes, training or data."""
