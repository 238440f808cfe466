"""Run a model, a step or a data set and leave no trace on it; nothing here knows a Vision Transformer."""
