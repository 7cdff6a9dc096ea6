"""Hold what both engine adapters need."""
