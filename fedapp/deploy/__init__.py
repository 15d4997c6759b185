"""Real machines: keys, the server, the participant's node, and what a researcher sends to them."""
