"""Models, adapters and data sets from the Hugging Face hub."""

DOWNLOAD = "lorafit-download"  # the name of a thread that downloads
