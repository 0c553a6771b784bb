"""The benchmarks of `psr evaluate`, and the workbench that they share."""
