"""What every room stands on: errors, files, seeds, progress, stages, assets. Imports nothing else of puna."""
