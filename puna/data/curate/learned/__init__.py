"""What operators learn from corpora before they score: classifiers, importance, language models."""
