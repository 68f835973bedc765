"""Formulas of quantization: pure functions of tensors and floats, each tied to its paper."""
