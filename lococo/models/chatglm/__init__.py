"""ChatGLM2 and ChatGLM3, in their own code and converted to Transformers'."""
