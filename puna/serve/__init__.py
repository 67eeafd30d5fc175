"""An OpenAI-compatible server over the decode engine, and its web page."""
