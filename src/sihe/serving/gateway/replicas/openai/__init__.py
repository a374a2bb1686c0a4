"""Replicas behind OpenAI's protocol: vLLM, or any other server that speaks it."""
