"""Which hosts there are, which of them is this one, and by which addresses they reach each other."""
