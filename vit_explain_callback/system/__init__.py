"""The file system, the terminal and lazy imports: what a package has to get right on every machine."""
