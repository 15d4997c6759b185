"""The whole privacy story of a run in one choice: what is protected, at which price, who accounts for it."""
