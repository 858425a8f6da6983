"""The gated delta rule as a part of a layer, and what mixes the tokens of a row there."""
