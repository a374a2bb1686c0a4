"""Claims about the RAG."""
