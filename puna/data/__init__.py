"""Corpora of declared kinds: sources, detection, splitting, leak checks, and what they were made from."""
