"""A base model in a GGUF file, given to the rest of the program as a model folder."""
