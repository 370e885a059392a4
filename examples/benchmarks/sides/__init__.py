"""What the benchmarks of speed and memory share: the adapters, the sides, the check before a timing, the report."""
