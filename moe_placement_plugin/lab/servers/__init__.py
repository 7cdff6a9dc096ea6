"""Start an engine's server for the demonstration, accuracy checks and benchmarks."""
