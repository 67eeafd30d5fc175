"""The decode engine and its samplers."""
