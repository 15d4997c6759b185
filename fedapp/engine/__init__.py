"""How rounds are executed: which processes train, and how messages reach them."""
