"""Drawn chest X-rays in the layout of a real set: for trying things out and for tests."""
