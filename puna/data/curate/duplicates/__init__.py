"""Pure functions over arrays that global operators share: signatures, bands, clusters, filters, tables."""
