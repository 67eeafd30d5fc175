"""Tokenizers, chat templates with exact loss spans, packing, vocabulary operators."""
