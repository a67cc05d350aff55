"""`prowd compare`: the runs of an experiment file, side by side."""
