"""What all ranks compare before weights are read: facts of each, gathered, and what is wrong with them."""
