"""Recipes, the runner, plans, claims and reports."""
