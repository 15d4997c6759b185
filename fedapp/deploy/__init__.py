"""Real machines: what operator, participant and researcher run around Flower's SuperLink and SuperNodes."""
