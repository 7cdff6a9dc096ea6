"""Demonstrate a placement: a tiny model, a real engine, a real request."""
