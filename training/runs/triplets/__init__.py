"""A run of `psr triplets`: draw, judge, filter, report."""
