"""A program behind `--`: how its command line is read, and how it is run as a child."""
