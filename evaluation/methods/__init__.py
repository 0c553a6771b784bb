"""Every method of the benchmarks' tables, one a file, and their registry."""
