"""The whole privacy story of a run in one choice: what is protected, at which price, and who accounts for it."""
