"""Plays a plan: the engine, and one player a backend."""
