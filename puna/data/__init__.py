"""Corpora and the sources they are built from."""
