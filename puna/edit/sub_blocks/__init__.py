"""Children out of a parent's sub-blocks: a library of variants, scores, costs, and the choice (S31)."""
