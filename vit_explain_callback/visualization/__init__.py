"""Pictures from explanation maps."""
