"""`python -m benchmarks.engine`: how fast one engine is on one device, beside vLLM and the hardware's limits."""
