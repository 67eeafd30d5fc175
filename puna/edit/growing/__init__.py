"""Models that grow: layers with a twin, shortcuts and series of activations."""
