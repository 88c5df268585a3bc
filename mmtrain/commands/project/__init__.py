"""Commands about a whole project: recipes, where a model comes from, and the machine."""
