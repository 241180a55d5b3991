"""One file for each kind of place that examples come from; `sapwood.data.load` chooses among them."""
