"""Metrics, samples and paired statistics."""
