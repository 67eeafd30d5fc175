"""Models made smaller: scores of units, allocations, learnt masks, adapters put back on the whole."""
