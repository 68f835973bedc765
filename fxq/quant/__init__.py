"""Modules that watch tensors or replace them by their quantized values."""
