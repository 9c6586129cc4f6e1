"""Speed, memory and overheads of this library beside others: `python -m benchmarks`."""
