"""Benchmarks of convbn_fx. `python -m bench.demo` is the one to begin with."""
