"""What a run leaves behind and shows meanwhile: its folder, its progress line, its summary and its page."""
