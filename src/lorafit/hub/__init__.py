"""Models, adapters and data sets from the Hugging Face hub."""
