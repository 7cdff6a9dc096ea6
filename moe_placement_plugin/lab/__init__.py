"""Measure and demonstrate the plugin; nothing that serves imports it."""
