"""Extract operators: text out of the bytes of one page."""
