"""Super-networks and the search of the children that are best for their cost."""
