"""The gates of a model that is being trained: their values, costs, penalties."""
