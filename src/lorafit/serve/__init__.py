"""The OpenAI-compatible server: requests and replies, who may ask, and the process; the batch is in infer/."""
