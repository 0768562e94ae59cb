"""What training and inference cost, for tools/benchmark.py and tools/benchmark_distance.py."""
