"""The stages of pruning, one file each: pure functions of values, without files or command line."""
