"""The network, its adapters, its loss, and how they are read from disk and put together."""
