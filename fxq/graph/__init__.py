"""The value passes work on: a captured program, its facts, its edits and its invariants."""
