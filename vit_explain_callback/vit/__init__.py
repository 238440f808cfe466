"""Look inside a Vision Transformer: its attention, its blocks and its tokens."""
