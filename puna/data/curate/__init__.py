"""Curation: operators over batches of documents, gates over stored signals, pools on disk, and presets."""
