"""What happened to a program: snapshots before and after each pass, and what changed between."""
