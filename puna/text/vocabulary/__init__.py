"""Vocabularies: trained, extended, and carried over from an old one by one sparse operator."""
