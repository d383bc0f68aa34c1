"""The OpenAI-compatible server: protocol, access checks, replies and process. Its batch is in infer/."""
