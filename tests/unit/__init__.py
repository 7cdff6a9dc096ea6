"""Tests that start no engine, in the folders of the package."""
