"""Measuring what a model draws: the grader for captioned shapes and the accuracy report built on it."""
