"""Numbers from explanation maps: drift, shape, localisation, faithfulness."""
