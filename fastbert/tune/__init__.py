"""Launch configurations for a GPU: problems to try them on, the search, and the device it asks."""
