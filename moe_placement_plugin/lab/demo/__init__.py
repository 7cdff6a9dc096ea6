"""The demonstration: a tiny model, a real engine, a real request."""
