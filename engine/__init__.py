"""Batched prefill and decode over a live model."""
