"""Functions that `torch.compile` leaves alone, without loading the compiler to say so."""

from __future__ import annotations

from torch._compile import _disable_dynamo

uncompiled = _disable_dynamo
"""`torch.compiler.disable`, which imports the compiler where it decorates: a second of every start.
This one imports it at the first call. PyTorch decorates its own functions so."""
