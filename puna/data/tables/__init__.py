"""Tables for preprocessing by a language model: rows as text, planted errors, prompts, answers."""
