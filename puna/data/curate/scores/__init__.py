"""Score operators: what a document is like, as numbers; nothing is decided here."""
