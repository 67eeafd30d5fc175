"""Map operators: what a document is turned into; none drops a document."""
