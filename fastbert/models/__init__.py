"""One small adapter a model family: its classes, and which submodule is what."""
