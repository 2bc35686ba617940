"""What experiments compare: methods, recipes, several SAEs. Imports no torch."""
