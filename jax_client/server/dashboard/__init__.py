"""The page on which people see their runs."""
