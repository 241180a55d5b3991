"""Sources of examples, one kind per file. `sapwood.data.load` chooses among them."""
