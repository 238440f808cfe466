"""Follow the explanations of a model over a run, without Lightning."""
