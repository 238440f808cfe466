"""The command `vit-explain`."""
