"""Exact integer products of fixed-point tensors: forward, input gradient and weight gradient."""
