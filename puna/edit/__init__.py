"""Models made out of models."""
