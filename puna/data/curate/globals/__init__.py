"""Global operators: what can only be said of a document when all of them were seen."""
