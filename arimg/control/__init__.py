"""Control images: extraction from photographs, encoding to tokens, fusion into a model."""
