"""Configuration: the schema of every key, and how recipe files and overrides become one Config."""
