"""Taking what was trained elsewhere: adapter, merged model, GGUF and Ollama folders, each read back and compared."""
