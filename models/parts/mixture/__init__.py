"""A mixture of experts as a residual part: the part, its router, the experts, and one that all tokens share."""
