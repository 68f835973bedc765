"""The program in integers: what backends run, what artifacts store, and what it computes exactly."""
