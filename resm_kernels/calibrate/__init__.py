"""Merges that are calibrated with the experts' own answers to prompts."""
