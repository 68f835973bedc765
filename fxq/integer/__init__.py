"""The program in integers: what backends run, artifacts store, and what it exactly computes."""
