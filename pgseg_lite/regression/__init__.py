"""Measure and keep still the masks of any text-prompted model: what stands on top of the engine."""
