"""Linear maps and lookups: dense layers, embeddings, and the matrix product that they share."""
