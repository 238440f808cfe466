"""The page of a run: one HTML file that shows its maps, curves and numbers, and loads nothing."""
